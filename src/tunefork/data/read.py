"""Any file of rows, or a data set of the hub, as rows."""

from __future__ import annotations

from pathlib import Path

from tunefork.data.delimited import read_delimited
from tunefork.data.files import find_file, read_text
from tunefork.data.hub import PREFIX, Role, read_hub
from tunefork.data.json_files import read_json, read_json_lines
from tunefork.data.rows import Finding, Row
from tunefork.data.tables import read_parquet, read_workbook


def read_rows(path: str | Path, *, role: Role = "train", unreadable: bool = False) -> tuple[list[Row], list[Finding]]:
    """All rows of a csv, tsv, json, jsonl (each also .gz), xlsx or parquet file, or `hub:owner/name[:config][@split]`.

    Values of csv and tsv are text, those of the other formats keep their type. A row that is bad by itself is left
    out, with a finding that names it; with `unreadable` it is there as well, without values. `role` picks the split of
    a hub data set where none is named.

    Raises MissingFileError when there is no such file, MissingExtraError when a reader is not installed, DataError
    when the file as a whole cannot be read or holds no readable row.
    """
    rows, findings = _read(str(path), role)
    return [row for row in rows if unreadable or not row.unreadable], findings


def _read(name: str, role: Role) -> tuple[list[Row], list[Finding]]:
    if name.startswith(PREFIX):
        return read_hub(name, role)
    file, kind = find_file(name)
    if kind == "xlsx":
        return read_workbook(file, name)
    if kind == "parquet":
        return read_parquet(file, name)
    text, notes = read_text(file, name)
    if kind == "json":
        rows, findings = read_json(text, name)
    elif kind == "jsonl":
        rows, findings = read_json_lines(text, name)
    else:
        rows, findings = read_delimited(text, name, tabs=kind == "tsv")
    return rows, notes + findings
