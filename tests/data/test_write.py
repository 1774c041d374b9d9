"""Rows out: read back as they were, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunefork.data import read_rows, write_rows
from tunefork.errors import DataError, MissingFileError, RunError

ROWS: list[dict[str, Any]] = [
    {"text": 'a, "quoted"\nline', "n": 1, "p": 0.25, "extra": None},
    {"text": "b\ttab; é中", "n": 2, "p": 0.75, "extra": "only here"},
]


@pytest.mark.parametrize("name", ["o.json", "o.jsonl", "o.jsonl.gz", "o.parquet", "o.xlsx"])
def test_typed_formats_read_back_equal(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, ROWS)
    rows, _ = read_rows(tmp_path / name)
    assert [dict(r.values) for r in rows] == ROWS


@pytest.mark.parametrize("name", ["o.csv", "o.tsv", "o.csv.gz"])
def test_text_formats_read_back_as_text(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, ROWS)
    rows, findings = read_rows(tmp_path / name)
    expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in ROWS]
    assert [dict(r.values) for r in rows] == expected
    assert findings == []


def test_columns_of_later_rows_and_lists(tmp_path: Path) -> None:
    write_rows(tmp_path / "o.csv", [{"a": 1}, {"b": [1, "é"], "a": True}])
    assert (tmp_path / "o.csv").read_text() == 'a,b\n1,\ntrue,"[1, ""é""]"\n'


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "o.parquet"
    target.write_bytes(b"before")
    with pytest.raises(DataError, match="values of one type"):
        write_rows(target, [{"a": 1}, {"a": "x"}], overwrite=True)
    with pytest.raises(DataError, match="must not be replaced unasked"):
        write_rows(target, ROWS)
    assert target.read_bytes() == b"before"
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(RunError, match=r"taken\.csv must succeed"):
        write_rows(tmp_path / "taken.csv", ROWS, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.parquet", "taken.csv"]


def test_refusals_name_what_to_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Try `o\.csv`"):
        write_rows(tmp_path / "o.docx", ROWS)
    with pytest.raises(MissingFileError, match="mkdir -p"):
        write_rows(tmp_path / "no" / "o.csv", ROWS)
