"""JSON and JSON lines: what is accepted, and where damage is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_text_files import found, written
from tunefork.data import read_rows
from tunefork.errors import DataError


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"text": "a", "label": 1}, {"text": "b", "label": null}]'),
        ("a.json", '{"data": [{"text": "a", "label": 1}, {"text": "b", "label": null}]}'),
        ("a.jsonl", '{"text": "a", "label": 1}\r\n{"text": "b", "label": null}\r\n'),
    ],
)
def test_json_values_keep_their_type(tmp_path: Path, name: str, content: str) -> None:
    rows, findings = read_rows(written(tmp_path, name, content))
    assert [dict(r.values) for r in rows] == [{"text": "a", "label": 1}, {"text": "b", "label": None}]
    assert [r.line for r in rows] == [1, 2]
    assert findings == []


def test_broken_lines_are_left_out_by_line_and_column(tmp_path: Path) -> None:
    content = '{"text": "a"}\n{"text": "b"\n[1, 2]\n\n"word"\n{}\n{"text": "c", "text": "d"}\n{"text": "e"}\n'
    path = written(tmp_path, "a.jsonl", content)
    rows, findings = read_rows(path)
    assert [r.line for r in rows] == [1, 8]
    unreadable = found(findings, "unreadable-row")
    assert unreadable.count == 5
    assert f"{path}:2: Expecting ',' delimiter at column 13" in unreadable.examples[0]
    assert unreadable.examples[1:] == (
        f"{path}:3: not an object: [1, 2]",
        f'{path}:5: not an object: "word"',
        f"{path}:6: an object without keys",
        f"{path}:7: key `text` given twice in one object",
    )
    assert found(findings, "blank-line").examples == (f"{path}:4",)


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path: Path) -> None:
    rows, _ = read_rows(written(tmp_path, "a.jsonl", '{"text": "one\u2028row\u0085here"}\n{"text": "two"}'))
    assert [r.values["text"] for r in rows] == ["one\u2028row\u0085here", "two"]


def test_nan_and_infinity_are_read_as_missing_and_said(tmp_path: Path) -> None:
    content = '[{"text": "a", "label": NaN}, {"text": "b", "label": 1}, {"x": {"y": [-Infinity, 2]}, "label": 0}]'
    for name, lines in (("a.json", content), ("a.jsonl", content[1:-1].replace("}, {", "}\n{"))):
        rows, findings = read_rows(written(tmp_path, name, lines))
        assert rows[0].values == {"text": "a", "label": None}
        assert rows[2].values == {"x": {"y": [None, 2]}, "label": 0}
        odd = found(findings, "not-json-number")
        assert (odd.level, odd.count) == ("warning", 2)
        assert odd.examples[0].endswith(":1: in `label`")


def test_a_long_line_is_accepted_and_named(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.jsonl", json.dumps({"text": "x" * 10_000_000}) + '\n{"text": "b"}'))
    assert len(rows[0].values["text"]) == 10_000_000
    assert found(findings, "long-row").examples[0].endswith("a.jsonl:1: 10,000,012 characters")


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.jsonl", r'{"text": "\ud83d"}' + "\n" + r'{"text": "\ud83d\ude00"}'))
    assert [r.values["text"] for r in rows] == ["\U0001f600"]
    assert "surrogate" in found(findings, "unreadable-row").examples[0]


@pytest.mark.parametrize(
    "hostile",
    ['{"a": ' + "[" * 100_000 + "}", '{"a": ' + "9" * 5000 + "}", '{"a": "\0"}', '{"a": "tab\tinside"}', "{'a': 1}"],
    ids=["deep", "huge-number", "nul", "raw-tab", "python"],
)
def test_hostile_lines_are_left_out(tmp_path: Path, hostile: str) -> None:
    rows, findings = read_rows(written(tmp_path, "a.jsonl", hostile + '\n{"a": 1}\n'))
    assert [r.line for r in rows] == [2]
    assert found(findings, "unreadable-row").count == 1
    with pytest.raises(DataError, match="must be valid JSON"):
        read_rows(written(tmp_path, "a.json", hostile))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', r"a\.json:2: .*line 2, column 10"),
        ("a.json", '{"text": "a", "label": 1}', "an object with the keys `text`, `label`"),
        ("a.json", '"text"', "Received str"),
        ("a.json", "[]", "empty array"),
        ("a.json", "{}", "an empty object"),
        ("a.json", "[1, 2]", "2 rows, none of them a JSON object"),
        ("a.json", '{"data": []}', "an object with the keys `data`"),
        ("a.jsonl", '[{"text": "a"}]', r"starts with `\[`. Try naming it \.json"),
        ("a.jsonl", "text,label\na,1\n", "none of them a JSON object"),
    ],
)
def test_json_that_is_no_rows_is_refused(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_rows(written(tmp_path, name, content))


def test_json_lines_under_the_name_json_are_read_and_said(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.json", '{"text": "a"}\n{"text": "b"}\n'))
    assert [r.values["text"] for r in rows] == ["a", "b"]
    assert found(findings, "json-lines").level == "info"


def test_keys_beside_data_are_said(tmp_path: Path) -> None:
    _, findings = read_rows(written(tmp_path, "a.json", '{"version": "1.1", "data": [{"text": "a"}]}'))
    assert "`version`" in found(findings, "unused-keys").message


TEXT = st.text('ab,\t\r\n"\\/{}[]é中😀\u2028\u0085\ufeff\0\ud7ff', max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), min_size=1, max_size=5), st.booleans())
def test_what_json_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, values: list, ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("json")
    lines = "\n".join(json.dumps(v, ensure_ascii=ascii_only) for v in values)
    array = json.dumps(values, ensure_ascii=ascii_only, indent=1)
    for name, content in (("a.jsonl", lines), ("a.json", array)):
        rows, findings = read_rows(written(folder, name, content))
        assert [r.values for r in rows] == values
        assert findings == []
