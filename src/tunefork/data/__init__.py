"""Rows in: read from any file, laid out, split, checked."""

from tunefork.data.check import check_items, normalised_form
from tunefork.data.layouts import apply_layout, detect_layout
from tunefork.data.load import load_splits
from tunefork.data.read import read_rows
from tunefork.data.rows import Finding, Item, Row, Splits
from tunefork.data.values import label_text
from tunefork.data.write import write_rows

__all__ = [
    "Finding",
    "Item",
    "Row",
    "Splits",
    "apply_layout",
    "check_items",
    "detect_layout",
    "label_text",
    "load_splits",
    "normalised_form",
    "read_rows",
    "write_rows",
]
