"""Rows in: read from any file, laid out, split, checked."""

from tunefork.data.check import check_items, normalised_form, overlap
from tunefork.data.layouts import apply_layout, detect_layout
from tunefork.data.load import Files, load_splits, read_files, split_files
from tunefork.data.read import read_rows
from tunefork.data.rows import Finding, Item, Row, Splits
from tunefork.data.values import label_text
from tunefork.data.write import check_target, write_rows

__all__ = [
    "Files",
    "Finding",
    "Item",
    "Row",
    "Splits",
    "apply_layout",
    "check_items",
    "check_target",
    "detect_layout",
    "label_text",
    "load_splits",
    "normalised_form",
    "overlap",
    "read_files",
    "read_rows",
    "split_files",
    "write_rows",
]
