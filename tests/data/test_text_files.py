"""CSV, TSV and what is wrong with files before anything is parsed."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunefork.data import Finding, read_rows
from tunefork.errors import DataError, MissingFileError


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def found(findings: list[Finding], code: str) -> Finding:
    return next(f for f in findings if f.code == code)


def test_csv_values_are_text_and_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'text,label\r\n"two\r\nlines, one field",1\r\nplain,2\r\n')
    rows, findings = read_rows(path)
    assert [dict(r.values) for r in rows] == [
        {"text": "two\r\nlines, one field", "label": "1"},
        {"text": "plain", "label": "2"},
    ]
    assert [r.source for r in rows] == [f"{path}:2", f"{path}:4"]
    assert findings == []


@pytest.mark.parametrize(
    ("content", "name"), [("text;label\na, b;1\nc;2\n", "semicolon"), ("text\tlabel\na, b\t1\nc\t2\n", "tab")]
)
def test_other_delimiters_are_told_and_said(tmp_path: Path, content: str, name: str) -> None:
    rows, findings = read_rows(written(tmp_path, "a.csv", content))
    assert [r.values["label"] for r in rows] == ["1", "2"]
    assert name in found(findings, "delimiter").message


def test_a_comma_wins_where_headers_also_hold_semicolons(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.csv", "text,label\na;b,1\nc;d,2\n"))
    assert rows[0].values == {"text": "a;b", "label": "1"}
    assert findings == []


def test_ragged_rows_are_left_out_by_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\ngood,1\ntoo,many,2\nfew\ngood,2,\n")
    rows, findings = read_rows(path)
    assert [r.line for r in rows] == [2, 5]  # a blank field past the last column does no harm
    unreadable = found(findings, "unreadable-row")
    assert unreadable.count == 2
    assert unreadable.examples == (f"{path}:3: 3 fields, the header has 2", f"{path}:4: 1 field, the header has 2")


def test_unquoted_commas_throughout_refuse_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of them readable; the first: .*a\.csv:2: 2 fields.*double quotes"):
        read_rows(written(tmp_path, "a.csv", "text\nhello, you\nwell, well\n"))


def test_blank_lines_are_counted_but_not_at_the_end(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.csv", "text,label\na,1\n\n,\nb,2\n\n\n"))
    assert len(rows) == 2
    assert found(findings, "blank-line").count == 2


def test_a_quote_that_never_closes_names_the_line_it_opens_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:3: a double quote .* never closed"):
        read_rows(written(tmp_path, "a.csv", 'text,label\na,1\n"b,2\nc,3\n'))


def test_a_quote_that_closes_in_a_field_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:2: a double quote .* middle of a field \(noticed on line 4\)"):
        read_rows(written(tmp_path, "a.csv", 'text,label\n"a,1\nb,2\n"c",3\n'))


def test_duplicate_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:1: column names must differ. Received `text` as columns 1 and 3"):
        read_rows(written(tmp_path, "a.csv", "text,label, text\na,1,b\n"))


def test_unnamed_and_padded_columns_are_said(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.csv", ", text\n0,a\n"))
    assert rows[0].values == {"column_1": "0", "text": "a"}
    assert "`column_1`" in found(findings, "unnamed-column").message
    assert "`text`" in found(findings, "padded-column-name").message


def test_a_header_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only a header: `text`, `label`"):
        read_rows(written(tmp_path, "a.csv", "text,label\n"))


def test_a_row_with_a_nul_byte_is_left_out(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.csv", "text,label\nfine text,1\nbro\0ken,2\n"))
    assert len(rows) == 1
    assert "NUL" in found(findings, "unreadable-row").examples[0]


def test_a_field_beyond_the_csv_modules_own_limit_is_read_and_named(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows, findings = read_rows(written(tmp_path, "a.csv", f"text,label\n{'x' * 10_000_000},1\n"))
    assert len(rows[0].values["text"]) == 10_000_000
    assert found(findings, "long-row").examples[0].endswith("a.csv:2: 10,000,001 characters")
    assert csv.field_size_limit() == before


def test_quotes_of_a_tsv_that_enclose_nothing_are_text(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.tsv", 'text\tlabel\n"open\t1\nmore"\t2\n"shut" it\t3\n'))
    assert [r.values["text"] for r in rows] == ['"open', 'more"', '"shut" it']
    assert found(findings, "quotes-are-text").level == "info"


def test_quotes_of_a_tsv_that_join_lines_are_text(tmp_path: Path) -> None:
    """Read as enclosing, rows 2 to 4 would silently become one."""
    rows, _ = read_rows(written(tmp_path, "a.tsv", 'text\tlabel\n"a\t1\nb\t2\nc"\t3\n'))
    assert [r.values["label"] for r in rows] == ["1", "2", "3"]


def test_quotes_of_a_tsv_that_enclose_are_taken_off(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.tsv", 'text\tlabel\n"a\ttab"\t1\n"two\nlines"\t2\n'))
    assert [r.values["text"] for r in rows] == ["a\ttab", "two\nlines"]
    assert findings == []


def test_a_byte_order_mark_is_skipped_and_said(tmp_path: Path) -> None:
    rows, findings = read_rows(written(tmp_path, "a.csv", b"\xef\xbb\xbftext,label\na,1\n"))
    assert rows[0].values["text"] == "a"
    assert found(findings, "byte-order-mark").level == "info"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match=r"must be UTF-8 text.*UTF-(16|32).*iconv -f UTF-(16|32)"):
        read_rows(written(tmp_path, "a.csv", "text,label\nsome words,1\n".encode(encoding)))


def test_latin_1_is_named_by_offset_and_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"byte 0xe9 at offset 14, line 2\. Try: iconv -f WINDOWS-1252"):
        read_rows(written(tmp_path, "a.csv", "text,label\ncafé,1\n".encode("latin-1")))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "empty file"),
        ("a.csv", b" \n\n", "without any text"),
        ("a.csv", b",,\n", "separators only"),
        ("a.csv", b"<!DOCTYPE html><html><body>404</body>", "web page"),
        ("a.json", b"\n <html>", "web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("a.csv", b"PK\x03\x04rest", "zip archive"),
        ("a.jsonl", b"PAR1rest", "Parquet"),
        ("a.csv", gzip.compress(b"text\na\n", mtime=0), "add `.gz`"),
        ("a.csv.gz", b"text\na\n", "must be gzip-compressed"),
        ("a.csv.gz", gzip.compress(b"text\n" + b"abc\n" * 99, mtime=0)[:-12], "ends early"),
        ("a.csv.gz", gzip.compress(b"text\na\n", mtime=0)[:-8] + b"\0" * 8, "damaged"),
        ("a.csv.gz", b"", "empty file"),
        ("a.docx", b"x", r"Received `\.docx`"),
        ("a", b"x", "no extension"),
        ("a.zip.gz", b"x", r"Received `\.zip\.gz`"),
    ],
)
def test_files_that_are_not_rows_are_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_rows(written(tmp_path, name, content))


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    rows, _ = read_rows(written(tmp_path, "a.CSV.gz", gzip.compress(b"text\na\n", mtime=0)))
    assert rows[0].values == {"text": "a"}


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, "train.csv", "x")
    with pytest.raises(MissingFileError, match=r"Did you mean `train\.csv`\?"):
        read_rows(tmp_path / "trian.csv")
    with pytest.raises(MissingFileError, match=r"Its folder holds `train\.csv`"):
        read_rows(tmp_path / "test.csv")
    with pytest.raises(MissingFileError, match="there is no folder"):
        read_rows(tmp_path / "nowhere" / "train.csv")


def test_a_hub_name_without_its_prefix_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # without and with a folder of the owner's name
        with pytest.raises(MissingFileError, match="try `hub:stanfordnlp/imdb`"):
            read_rows("stanfordnlp/imdb")
        (tmp_path / "stanfordnlp").mkdir(exist_ok=True)


def test_a_folder_suggests_its_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="It holds no file of"):
        read_rows(tmp_path)
    written(tmp_path, "train.csv", "x")
    with pytest.raises(DataError, match=r"Received the folder .* Try one of the files in it: `train\.csv`"):
        read_rows(tmp_path)


CELLS = st.text("ab,;|\t\r\n\"'\\ =é中😀\u2028\u0085\ufeff\x0b\x1c", max_size=12)


@given(st.lists(st.tuples(CELLS.filter(str.strip), CELLS), min_size=1, max_size=8))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, cells: list) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *cells])
    path = written(tmp_path_factory.mktemp("csv"), "a.csv", out.getvalue())
    rows, _ = read_rows(path)
    assert [(r.values["text"], r.values["label"]) for r in rows] == cells
