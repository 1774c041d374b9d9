"""Workbooks, Parquet files and hub names."""

from __future__ import annotations

import datetime
import decimal
import sys
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from tests.data.test_text_files import found, written
from tunefork.data import read_rows
from tunefork.data.hub import HubName, parse_hub_name
from tunefork.errors import DataError, MissingExtraError


def workbook(folder: Path, *rows: list[Any], merge: str = "", more: tuple[str, ...] = ()) -> Path:
    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    for row in rows:
        sheet.append(row)
    if merge:
        sheet.merge_cells(merge)
    for name in more:
        book.create_sheet(name)
    path = folder / "a.xlsx"
    book.save(path)
    return path


def test_cells_keep_their_type_and_lines_are_the_sheets(tmp_path: Path) -> None:
    rows, findings = read_rows(workbook(tmp_path, ["text", "label"], ["a", 1], ["b", 2.5], ["c", True]))
    assert [(r.values["text"], r.values["label"], r.line) for r in rows] == [("a", 1, 2), ("b", 2.5, 3), ("c", True, 4)]
    assert findings == []


def test_dates_become_text_and_are_said(tmp_path: Path) -> None:
    rows, findings = read_rows(workbook(tmp_path, ["text", "when"], ["a", datetime.date(2026, 1, 31)]))
    assert str(rows[0].values["when"]).startswith("2026-01-31")
    assert found(findings, "date-as-text").examples[0].endswith("a.xlsx:2: when")


def test_only_the_first_sheet_is_read_and_said(tmp_path: Path) -> None:
    rows, findings = read_rows(workbook(tmp_path, ["text"], ["a"], more=("Archive",)))
    assert len(rows) == 1
    assert "`Archive`" in found(findings, "several-sheets").message


def test_formulas_without_a_stored_result_are_missing_and_said(tmp_path: Path) -> None:
    rows, findings = read_rows(workbook(tmp_path, ["text", "label"], ["a", "=1+1"], ["b", 2]))
    assert rows[0].values["label"] is None
    assert found(findings, "formula-without-value").examples[0].endswith("a.xlsx:2: label")


def test_merged_cells_and_spreadsheet_errors_are_said(tmp_path: Path) -> None:
    path = workbook(tmp_path, ["text", "label"], ["a", 1], ["b", None], ["c", "#REF!"], merge="B2:B3")
    rows, findings = read_rows(path)
    assert [r.values["label"] for r in rows] == [1, None, None]
    assert found(findings, "merged-cells").examples == ("B2:B3",)
    assert found(findings, "spreadsheet-error").count == 1


def test_blank_rows_and_values_beyond_the_columns_are_said(tmp_path: Path) -> None:
    rows, findings = read_rows(workbook(tmp_path, [], ["text", "label"], ["a", 1], [], ["b", 2, "note"], ["c", 3]))
    assert [r.line for r in rows] == [3, 6]
    assert found(findings, "blank-line").examples[0].endswith(":4")
    assert found(findings, "unreadable-row").examples[0].endswith(":5: values beyond the last named column (label)")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "empty first sheet"),
        ([["text", "label"]], "none below it"),
        ([["text", "text"], ["a", "b"]], "column names must differ"),
    ],
)
def test_sheets_without_rows_are_refused(tmp_path: Path, rows: list[list[Any]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_rows(workbook(tmp_path, *rows))


@pytest.mark.parametrize("content", [b"PK\x03\x04 not a zip", b"\xd0\xcf\x11\xe0 old", b"text,label\na,1\n"])
def test_a_damaged_workbook_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"must be an \.xlsx workbook"):
        read_rows(written(tmp_path, "a.xlsx", content))


def test_a_truncated_workbook_is_refused(tmp_path: Path) -> None:
    whole = workbook(tmp_path, ["text"], ["a"]).read_bytes()
    for size in (len(whole) // 3, len(whole) - 10):
        with pytest.raises(DataError, match=r"must be an \.xlsx workbook"):
            read_rows(written(tmp_path, "a.xlsx", whole[:size]))


def parquet(folder: Path, columns: dict[str, list[Any]]) -> Path:
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_values_keep_their_type(tmp_path: Path) -> None:
    columns = {
        "text": ["a", "b"],
        "label": [1, None],
        "messages": [[{"role": "user"}], []],
        "price": [decimal.Decimal("1.50"), decimal.Decimal("2.00")],
        "when": [datetime.date(2026, 1, 31), None],
    }
    rows, findings = read_rows(parquet(tmp_path, columns))
    assert dict(rows[0].values) == {
        "text": "a",
        "label": 1,
        "messages": [{"role": "user"}],
        "price": 1.5,
        "when": "2026-01-31",
    }
    assert rows[1].line == 2
    assert [f.code for f in findings] == ["date-as-text"]


def test_pictures_in_parquet_are_not_rows(tmp_path: Path) -> None:
    rows, findings = read_rows(parquet(tmp_path, {"image": [b"\xff\xd8", b"plain"]}))
    assert rows[0].values == {"image": "plain"}
    assert "not text" in found(findings, "unreadable-row").examples[0]
    with pytest.raises(DataError, match="none of them readable"):
        read_rows(parquet(tmp_path, {"image": [b"\xff\xd8"]}))


def test_damaged_and_empty_parquet_is_refused(tmp_path: Path) -> None:
    whole = parquet(tmp_path, {"text": ["a"] * 100}).read_bytes()
    flipped = bytearray(whole)
    flipped[-7] ^= 0xFF  # in the length of the footer
    for content in (whole[:50], bytes(flipped), b"text,label\na,1\n", whole[10:]):
        with pytest.raises(DataError, match="must be a Parquet file"):
            read_rows(written(tmp_path, "a.parquet", content))
    with pytest.raises(DataError, match="no rows"):
        read_rows(parquet(tmp_path, {"text": pyarrow.array([], pyarrow.string())}))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("openpyxl", "a.xlsx", "excel"), ("pyarrow", "a.parquet", "parquet"), ("datasets", "hub:owner/name", "hub")],
)
def test_a_reader_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what an import of a package that is not there does
    path = name if name.startswith("hub:") else str(written(tmp_path, name, b"x"))
    with pytest.raises(MissingExtraError, match=rf"needs the package `{module}`.*tunefork\[{extra}\]"):
        read_rows(path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub:stanfordnlp/imdb", HubName("stanfordnlp/imdb")),
        ("hub:squad", HubName("squad")),
        ("hub:nyu-mll/glue:sst2", HubName("nyu-mll/glue", "sst2")),
        ("hub:nyu-mll/glue:sst2@validation", HubName("nyu-mll/glue", "sst2", "validation")),
        ("hub:stanfordnlp/imdb@train[:10%]", HubName("stanfordnlp/imdb", None, "train[:10%]")),
    ],
)
def test_hub_names(path: str, name: HubName) -> None:
    assert parse_hub_name(path) == name


@pytest.mark.parametrize("path", ["hub:", "hub:a b", "hub:a:b:c", "hub:@train", "hub:a@"])
def test_hub_names_of_another_form_are_refused(path: str) -> None:
    with pytest.raises(DataError, match=r"must be written hub:owner/name\[:config\]\[@split\]"):
        parse_hub_name(path)


def test_a_folder_in_the_hubs_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pairs"
    folder.mkdir()
    written(folder, "train.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    written(folder, "test.jsonl", '{"text": "c", "label": 1}\n')
    rows, _ = read_rows(f"hub:{folder}")
    assert [(r.source, r.values["text"]) for r in rows] == [
        (f"hub:{folder}@train:{i}", t) for i, t in ((1, "a"), (2, "b"))
    ]
    rows, _ = read_rows(f"hub:{folder}", role="test")
    assert [r.values["text"] for r in rows] == ["c"]
    with pytest.raises(DataError, match="must say which split to use for dev"):
        read_rows(f"hub:{folder}", role="dev")
    with pytest.raises(DataError, match="must be readable"):
        read_rows(f"hub:{folder}:other@train")
