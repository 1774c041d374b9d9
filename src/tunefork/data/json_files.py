"""JSON and JSON lines: one object a row, damage named by line and column."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from tunefork.data.delimited import LONG_ROW
from tunefork.data.findings import Tally
from tunefork.data.rows import Finding, Row
from tunefork.data.values import counted, listed, shorten
from tunefork.errors import DataError


class _Reader:
    """A JSON decoder that notices what Python's lets pass: a key given twice, NaN, Infinity."""

    def __init__(self) -> None:
        self.odd_numbers = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def read(self, text: str) -> Any:
        """Raises ValueError (JSONDecodeError where the place is known) for what is not JSON."""
        try:
            return self._decoder.decode(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key `{next(k for k in keys if keys.count(k) > 1)}` given twice in one object")
        return values

    def _constant(self, name: str) -> float:
        self.odd_numbers += 1
        return float(name)


def read_json(text: str, path: str) -> tuple[list[Row], list[Finding]]:
    """Rows of a JSON array of objects, or of `{"data": [...]}`; `line` is the place in the array, from 1.

    JSON lines under the name .json are read as such, with a finding. Raises DataError for anything else.
    """
    reader = _Reader()
    try:
        document = reader.read(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{") and _starts_with_row(text):
            note = f"`{path}` holds JSON lines, not one JSON document, and was read so."
            rows, findings = read_json_lines(text, path)
            return rows, [Finding("info", "json-lines", note), *findings]
        raise DataError(
            f"{path}:{error.lineno}: a .json file must be valid JSON. Received: {error.msg} at line {error.lineno:,}, "
            f"column {error.colno:,}. Try mending it there; one object a line belongs into a .jsonl file."
        ) from error
    except ValueError as error:
        raise DataError(f"`{path}` must be valid JSON. Received: {_brief(error)}. Try mending it.") from error
    array, findings = _array(document, path)
    tally = Tally()
    rows: list[Row] = []
    for place, value in enumerate(array, 1):
        rows.append(_as_row(value, text, path, place, tally, reader.odd_numbers > 0))
    return _some(rows, tally, path), findings + tally.findings()


def read_json_lines(text: str, path: str) -> tuple[list[Row], list[Finding]]:
    """Rows of JSON lines, one object a line. A line that is not one is left out with a finding.

    Raises DataError when no line is readable.
    """
    if text.lstrip().startswith("["):
        raise DataError(
            f"A .jsonl file must hold one object a line. Received `{path}`, which starts with `[`. "
            "Try naming it .json if it is one array."
        )
    reader, tally = _Reader(), Tally()
    rows: list[Row] = []
    for number, line in enumerate(text.rstrip().split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            tally.add("blank-line", f"{path}:{number}")
            continue
        where, odd_before = f"{path}:{number}", reader.odd_numbers
        try:
            value = reader.read(line)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno:,}: {_around(line, error.pos)}"
            rows.append(_unreadable(problem, path, number, tally))
            continue
        except ValueError as error:
            rows.append(_unreadable(_brief(error), path, number, tally))
            continue
        rows.append(_as_row(value, line, path, number, tally, reader.odd_numbers > odd_before))
        if len(line) > LONG_ROW and not rows[-1].unreadable:
            tally.add("long-row", where, f"{len(line):,} characters")
    return _some(rows, tally, path), tally.findings()


def _starts_with_row(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict)
    except ValueError:
        return False


def _array(document: Any, path: str) -> tuple[list[Any], list[Finding]]:
    if isinstance(document, list):
        if not document:
            raise DataError(f"`{path}` must hold rows. Received an empty array.")
        return document, []
    if isinstance(document, dict) and isinstance(document.get("data"), list) and document["data"]:
        rest = [key for key in document if key != "data"]
        if not rest:
            return document["data"], []
        message = f"Beside `data`, `{path}` holds {listed(rest)}, which was not used."
        return document["data"], [Finding("info", "unused-keys", message, len(rest))]
    what = type(document).__name__
    if isinstance(document, dict):
        what = f"an object with the keys {listed(list(document))}" if document else "an empty object"
    raise DataError(
        f"A .json file must be an array of objects, or an object whose `data` is one. Received {what} (`{path}`). "
        "Try a .jsonl file with one object a line."
    )


def _as_row(value: Any, text: str, path: str, line: int, tally: Tally, odd_numbers: bool) -> Row:
    """The value read from `text` as a row; an unreadable one, said in the tally, where it cannot be one."""
    if problem := _not_a_row(value) or _unwritable(value, text):
        return _unreadable(problem, path, line, tally)
    return Row(_without_odd_numbers(value, f"{path}:{line}", tally) if odd_numbers else value, path, line)


def _unreadable(problem: str, path: str, line: int, tally: Tally) -> Row:
    tally.add("unreadable-row", f"{path}:{line}", problem)
    return Row({}, path, line, unreadable=problem)


def _not_a_row(value: Any) -> str:
    if isinstance(value, dict):
        return "" if value else "an object without keys"
    return f"not an object: {shorten(json.dumps(value), 40)}"


def _unwritable(value: Any, text: str) -> str:
    r"""Half a surrogate pair (`\ud83d` alone) is valid JSON, but no text that could be tokenized or written."""
    if "\\ud" not in text and "\\uD" not in text:
        return ""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair ({error.object[error.start]!r}), which is no character"
    return ""


def _without_odd_numbers(value: Any, where: str, tally: Tally) -> Any:
    found = False

    def mended(inner: Any) -> Any:
        nonlocal found
        if isinstance(inner, float) and not math.isfinite(inner):
            found = True
            return None
        if isinstance(inner, dict):
            return {key: mended(v) for key, v in inner.items()}
        return [mended(v) for v in inner] if isinstance(inner, list) else inner

    result = mended(value)
    if found:
        odd = [key for key, v in value.items() if result[key] != v]
        tally.add("not-json-number", where, f"in {listed(odd)}")
    return result


def _some(rows: list[Row], tally: Tally, path: str) -> list[Row]:
    if len(rows) > tally.left_out:
        return rows
    raise DataError(
        f"`{path}` must hold readable rows. Received {counted(tally.left_out, 'row')}, none of them a JSON object; "
        f"the first: {tally.first()}. Try one JSON object a line (.jsonl) or an array of objects (.json)."
    )


def _around(line: str, place: int) -> str:
    return shorten(line[max(0, place - 20) : place + 20], 40)


def _brief(error: Iterable[str] | Exception) -> str:
    return shorten(str(error).split(";")[0], 120)
