"""CSV and TSV: strict about quotes, exact about lines, and open about every guess."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
from collections.abc import Iterator, Sequence

from tunefork.data.findings import Tally
from tunefork.data.rows import Finding, Row
from tunefork.data.values import counted, listed
from tunefork.errors import DataError

FIELD_LIMIT = 1 << 30  # characters in one field; Python's own limit of 131,072 is less than a long document
LONG_ROW = 1_000_000
_SNIFFED = 20  # records looked at to tell the delimiter
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}

Record = tuple[int, list[str]]  # (first line, fields)


def read_delimited(text: str, path: str, *, tabs: bool) -> tuple[list[Row], list[Finding]]:
    """Rows of CSV (or, with `tabs`, TSV) text; `line` is the line a record starts on, the header being line 1.

    A record with too many or too few fields is left out with a finding. Raises DataError where no row can be
    trusted any more: a quote that is never closed, two columns of one name, no rows below the header.
    """
    allowed = csv.field_size_limit(FIELD_LIMIT)
    try:
        return _read(text, path, tabs)
    finally:
        csv.field_size_limit(allowed)


def _read(text: str, path: str, tabs: bool) -> tuple[list[Row], list[Finding]]:
    findings: list[Finding] = []
    delimiter, quotes = ("\t" if tabs else _sniff(text)), True
    if delimiter != "," and not tabs:
        message = f"`{path}` separates its columns with a {_NAMES[delimiter]}, and was read so."
        findings.append(Finding("info", "delimiter", message))
    if tabs and '"' in text and _quotes_are_text(text, path):
        quotes = False
        message = f"`{path}` does not use quotes to enclose fields; its quotes were read as text."
        findings.append(Finding("info", "quotes-are-text", message))
    records = list(_records(text, path, delimiter, quotes))
    while records and _blank(records[-1][1]):  # blank lines at the end of a file are nothing to speak of
        records.pop()
    if not records:
        raise DataError(f"`{path}` must hold rows. Received separators only.")
    first = next(i for i, (_, fields) in enumerate(records) if not _blank(fields))
    names, more = column_names(records[first][1], path, records[first][0])
    tally, nul = Tally(), "\0" in text
    rows: list[Row] = []
    for line, fields in records[first + 1 :]:
        if _blank(fields):
            tally.add("blank-line", f"{path}:{line}")
            continue
        problem = _problem(fields, names, nul)
        if problem:
            tally.add("unreadable-row", f"{path}:{line}", problem)
            rows.append(Row({}, path, line, unreadable=problem))
            continue
        if sum(map(len, fields)) > LONG_ROW:
            tally.add("long-row", f"{path}:{line}", f"{sum(map(len, fields)):,} characters")
        rows.append(Row(dict(zip(names, fields, strict=False)), path, line))
    if len(rows) == tally.left_out:
        if rows:
            raise DataError(
                f"`{path}` must hold readable rows. Received {counted(tally.left_out, 'row')}, none of them readable; "
                f"the first: {tally.first()}. Try enclosing text that holds a {_NAMES[delimiter]} in double quotes."
            )
        raise DataError(
            f"`{path}` must hold rows below its header. Received only a header: {listed(names)}. "
            "Try adding rows, or a header line if this one is a row."
        )
    return rows, findings + more + tally.findings()


def column_names(header: Sequence[object], path: str, line: int) -> tuple[list[str], list[Finding]]:
    """Column names as they are used: outer spaces taken off, `column_3` where the third has no name.

    Raises DataError when two columns have one name.
    """
    given = ["" if name is None else str(name) for name in header]
    names = [name.strip() or f"column_{i}" for i, name in enumerate(given, 1)]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        at = [i for i, name in enumerate(names, 1) if name == twice[0]]
        raise DataError(
            f"{path}:{line}: column names must differ. Received `{twice[0]}` as columns {at[0]} and {at[1]}. "
            "Try renaming one of them."
        )
    unnamed = [f"`{name}`" for name, raw in zip(names, given, strict=True) if not raw.strip()]
    padded = [f"`{name}`" for name, raw in zip(names, given, strict=True) if raw.strip() and raw != name]
    findings: list[Finding] = []
    if unnamed:
        message = f"{counted(len(unnamed), 'column')} of `{path}` without a name, called {', '.join(unnamed)}."
        findings.append(Finding("info", "unnamed-column", message, len(unnamed)))
    if padded:
        message = f"Spaces around {counted(len(padded), 'column name')} of `{path}` taken off: {', '.join(padded)}."
        findings.append(Finding("info", "padded-column-name", message, len(padded)))
    return names, findings


def _records(text: str, path: str, delimiter: str, quotes: bool) -> Iterator[Record]:
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    line = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(_broken(str(error), path, line, reader.line_num)) from error
        yield line, fields
        line = reader.line_num + 1


def _broken(error: str, path: str, line: int, noticed: int) -> str:
    if "unexpected end" in error:
        what = "one that is never closed, so everything below would be swallowed"
    elif "expected after" in error:
        what = f"one that closes in the middle of a field (noticed on line {noticed:,})"
    else:
        return f"{path}:{line}: a record must be readable. Received: {error}. Try exporting the file again."
    return (
        f"{path}:{line}: a double quote that opens a field must close at its end. Received {what}. "
        'Try writing quotes inside text twice (""), or exporting the file again.'
    )


def _blank(fields: Sequence[str]) -> bool:
    return not any(field.strip() for field in fields)


def _problem(fields: list[str], names: Sequence[str], nul: bool) -> str:
    """Why a record is no row; an empty string when it is one. Blank fields past the last column do no harm."""
    if len(fields) < len(names) or (len(fields) > len(names) and not _blank(fields[len(names) :])):
        return f"{counted(len(fields), 'field')}, the header has {len(names)}"
    return "holds a NUL byte" if nul and any("\0" in field for field in fields) else ""


def _sniff(text: str) -> str:
    """The delimiter under which the first records agree with the header; a comma where none does better."""
    best, best_score = ",", 0
    for delimiter in _NAMES:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        widths: list[int] = []
        with contextlib.suppress(csv.Error):  # said with its line when the whole file is read
            widths.extend(len(fields) for fields in itertools.islice(reader, _SNIFFED) if fields)
        score = sum(width == widths[0] for width in widths) if widths and widths[0] > 1 else 0
        if score > best_score:
            best, best_score = delimiter, score
    return best


def _quotes_are_text(text: str, path: str) -> bool:
    """Whether fewer records disagree with the header when quotes mean nothing (or as few, without joining lines)."""

    def disagreeing(quotes: bool) -> tuple[int, int]:
        widths = [len(fields) for _, fields in _records(text, path, "\t", quotes) if fields]
        return sum(width != widths[0] for width in widths), len(widths)

    as_text = disagreeing(False)
    try:
        enclosing = disagreeing(True)
    except DataError:
        return True
    return as_text[0] < enclosing[0] or (as_text[0] == enclosing[0] and as_text[1] > enclosing[1])
