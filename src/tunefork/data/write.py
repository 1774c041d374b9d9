"""Rows out, in the format the name asks for, whole or not at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunefork.data.files import ACCEPTED, TEXT_FORMATS, format_of
from tunefork.errors import DataError, MissingExtraError, MissingFileError
from tunefork.files import write_atomic


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], *, overwrite: bool = False) -> None:
    """Writes rows as csv, tsv, json, jsonl (each also .gz), xlsx or parquet, by the extension of `path`.

    Columns are those of all rows, in the order they are met. In csv, tsv and xlsx lists and objects become JSON text
    and None an empty cell. No half-written file is ever seen.

    Raises DataError for another extension, or for a file that is there unless `overwrite`; MissingFileError for a
    missing folder, MissingExtraError when the format's package is not installed, RunError or TrainingError when the
    disk refuses.
    """
    path = Path(path)
    kind = check_target(path, overwrite)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if kind in TEXT_FORMATS:
        data = _as_text(kind, columns, rows).encode()
        if path.name.lower().endswith(".gz"):
            data = gzip.compress(data, mtime=0)  # the same rows give the same bytes
    else:
        data = _workbook(path, columns, rows) if kind == "xlsx" else _parquet(path, columns, rows)
    write_atomic(path, data)


def check_target(path: Path, overwrite: bool = False) -> str:
    """The format that rows would be written in; raises DataError or MissingFileError where they cannot be."""
    kind = format_of(path.name)
    if kind is None:
        raise DataError(f"Rows can be written as {ACCEPTED}. Received `{path}`. Try `{path.stem}.csv`.")
    if not path.parent.is_dir():
        raise MissingFileError(f"The folder to write into must exist. Received `{path}`. Try: mkdir -p {path.parent}")
    if path.exists() and not overwrite:
        raise DataError(f"A file must not be replaced unasked. `{path}` is there. Try another name, or --overwrite.")
    return kind


def _as_text(kind: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    if kind == "jsonl":
        return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    if kind == "json":
        return json.dumps([dict(row) for row in rows], ensure_ascii=False, indent=1) + "\n"
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping | list | tuple | bool):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else value


def _workbook(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    try:
        import openpyxl
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise MissingExtraError("openpyxl", "excel", f"Writing `{path}`") from error

    def cell(value: Any) -> Any:
        value = value if isinstance(value, bool) else _cell(value)
        return ILLEGAL_CHARACTERS_RE.sub(" ", value) if isinstance(value, str) else value

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("rows")
    sheet.append(list(columns))
    for row in rows:
        sheet.append([cell(row.get(column)) for column in columns])
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def _parquet(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", f"Writing `{path}`") from error
    out = io.BytesIO()
    try:
        table = pyarrow.Table.from_pydict({column: [row.get(column) for row in rows] for column in columns})
    except pyarrow.ArrowException as error:
        raise DataError(
            f"A column of a Parquet file must hold values of one type. Received: {error}. Try `{path.stem}.jsonl`."
        ) from error
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()
