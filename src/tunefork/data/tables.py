"""Workbooks and Parquet files, through openpyxl and pyarrow (both extras)."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from tunefork.data.delimited import column_names
from tunefork.data.files import read_bytes
from tunefork.data.findings import Tally
from tunefork.data.rows import Finding, Row
from tunefork.data.values import counted, is_blank, is_date, json_value, listed
from tunefork.errors import DataError, MissingExtraError


def read_workbook(file: Path, path: str) -> tuple[list[Row], list[Finding]]:
    """Rows of the first sheet of an .xlsx workbook, whose first filled row names the columns; `line` is its row.

    Formulas give the result that was last stored. Raises MissingExtraError, or DataError for a damaged workbook,
    a name given to two columns, or a sheet without rows.
    """
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise MissingExtraError("openpyxl", "excel", f"Reading `{path}`") from error
    damaged = (zipfile.BadZipFile, InvalidFileException, ParseError, KeyError, ValueError, TypeError, OSError, EOFError)
    read_bytes(file, path)
    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        try:
            sheets = [sheet.title for sheet in book.worksheets]
            if not sheets:
                raise DataError(f"`{path}` must hold a sheet with rows. Received a workbook without sheets.")
            sheet: Any = book.worksheets[0]
            sheet.reset_dimensions()  # the size that some programs store is wrong
            cells = [[(cell.value, cell.data_type) for cell in row] for row in sheet.iter_rows()]
        finally:
            book.close()
        width = max(map(len, cells), default=0)  # trailing blank cells may not be there at all
        blank_cells = any(len(row) < width or any(value is None for value, _ in row) for row in cells)
        formulas, merged = _second_look(openpyxl, file) if blank_cells else (set[tuple[int, int]](), list[str]())
    except damaged as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"`{path}` must be an .xlsx workbook. Received a damaged, encrypted or other file "
            f"({type(error).__name__}: {error}). Try saving it again as .xlsx, or as .csv."
        ) from error
    rows, findings = _sheet_rows(cells, formulas, path)
    if len(sheets) > 1:
        message = f"`{path}` has {len(sheets)} sheets: {listed(sheets)}. Only the first was read."
        advice = "Move the wanted sheet to the front, or save it as a file of its own."
        findings.append(Finding("info", "several-sheets", message, len(sheets), advice=advice))
    if merged:
        message = f"`{path}` has merged cells; only the first cell of each holds the value, the others are empty."
        advice = "Unmerge them and fill in every cell."
        findings.append(Finding("warning", "merged-cells", message, len(merged), tuple(merged[:5]), advice))
    return rows, findings


def _second_look(openpyxl: Any, file: Path) -> tuple[set[tuple[int, int]], list[str]]:
    """Places (row, column) of formulas, and merged ranges: what the fast reader cannot tell from an empty cell."""
    book = openpyxl.load_workbook(file)
    sheet = book.worksheets[0]
    formulas = {(cell.row, cell.column) for row in sheet.iter_rows() for cell in row if cell.data_type == "f"}
    return formulas, [str(area) for area in sheet.merged_cells.ranges]


def _sheet_rows(
    cells: Sequence[Sequence[tuple[Any, str]]], formulas: set[tuple[int, int]], path: str
) -> tuple[list[Row], list[Finding]]:
    filled = [(n, row) for n, row in enumerate(cells, 1) if not all(is_blank(value) for value, _ in row)]
    if not filled:
        raise DataError(f"`{path}` must hold rows. Received an empty first sheet. Try moving the rows to it.")
    line, header = filled[0]
    width = max(i for i, (value, _) in enumerate(header, 1) if not is_blank(value))
    names, findings = column_names([value for value, _ in header[:width]], path, line)
    tally = Tally()
    rows: list[Row] = []
    expected = line + 1
    for number, row in filled[1:]:
        for blank in range(expected, number):
            tally.add("blank-line", f"{path}:{blank}")
        expected = number + 1
        where = f"{path}:{number}"
        if any(not is_blank(value) for value, _ in row[width:]):
            problem = f"values beyond the last named column ({names[-1]})"
            tally.add("unreadable-row", where, problem)
            rows.append(Row({}, path, number, unreadable=problem))
            continue
        values: dict[str, Any] = dict.fromkeys(names)
        broken, unsaved, dates = [], [], []
        for column, (name, (value, kind)) in enumerate(zip(names, row, strict=False), 1):
            if kind == "e":
                broken.append(f"`{name}` is {value}")
                continue
            if value is None and (number, column) in formulas:
                unsaved.append(name)
            if is_date(value):
                dates.append(name)
            values[name] = json_value(value)
        for code, found in (("spreadsheet-error", broken), ("formula-without-value", unsaved), ("date-as-text", dates)):
            if found:
                tally.add(code, where, ", ".join(found))
        rows.append(Row(values, path, number))
    if len(rows) == tally.left_out:
        first = f" ({tally.first()})" if tally.left_out else ""
        raise DataError(f"`{path}` must hold rows below its header. Received {listed(names)} and none below it{first}.")
    return rows, findings + tally.findings()


def read_parquet(file: Path, path: str) -> tuple[list[Row], list[Finding]]:
    """Rows of a Parquet file; `line` is the place in the file, from 1. Raises MissingExtraError or DataError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", f"Reading `{path}`") from error
    read_bytes(file, path)
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            columns = opened.schema_arrow.names
            records = opened.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        detail = " ".join(str(error).split())[:160]
        raise DataError(
            f"`{path}` must be a Parquet file. Received a damaged or other file ({detail}). Try writing it again."
        ) from error
    _, findings = column_names(columns, path, 1)
    if not records:
        raise DataError(
            f"`{path}` must hold rows. Received a Parquet file with the columns {listed(columns)} and no rows."
        )
    rows, more = plain_rows(records, path)
    return rows, findings + more


def plain_rows(records: Iterable[dict[str, Any]], path: str) -> tuple[list[Row], list[Finding]]:
    """Records of a table as rows of JSON's types; one that holds pictures or other bytes is left out with a finding."""
    tally = Tally()
    rows: list[Row] = []
    for place, record in enumerate(records, 1):
        where = f"{path}:{place}"
        dates = [name for name, value in record.items() if is_date(value)]
        try:
            values = {name.strip(): json_value(value) for name, value in record.items()}
        except TypeError as error:
            tally.add("unreadable-row", where, error)
            rows.append(Row({}, path, place, unreadable=str(error)))
            continue
        if dates:
            tally.add("date-as-text", where, ", ".join(dates))
        rows.append(Row(values, path, place))
    if len(rows) == tally.left_out:
        raise DataError(
            f"`{path}` must hold readable rows. Received {counted(tally.left_out, 'row')}, none of them readable; "
            f"the first: {tally.first()}. Try dropping the columns that hold no text or numbers."
        )
    return rows, tally.findings()
