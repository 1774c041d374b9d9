"""Single values: what counts as missing, when two labels are the same, and how a value is shown in a message."""

from __future__ import annotations

import datetime
import decimal
import math
import re
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

_WHOLE = re.compile(r"([+-]?\d+)\.0+")
_MISSING = {"", "nan", "#n/a"}
_COMMANDS = {  # what a terminal obeys rather than shows: control characters, and marks that turn the order of letters
    code: chr(code).encode("unicode_escape").decode()
    for code in (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
}


def label_text(value: object) -> str | None:
    """A label as the text it is compared by; None where there is none.

    Missing are None, a float NaN, blank text, and the texts `nan` and `#N/A` that spreadsheets and data frames write.
    Whole numbers lose their `.0` (`1`, `1.0` and `"1.0"` are `1`), truth values are `true` and `false` in whichever
    case they came, other text keeps its case and loses outer spaces. Lists and objects are no labels: None.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    if not isinstance(value, str):
        return None
    text = value.strip()
    lower = text.lower()
    if lower in _MISSING:
        return None
    if lower in ("true", "false"):
        return lower
    whole = _WHOLE.fullmatch(text)
    return str(int(whole[1])) if whole else text


def look_up(values: Mapping[str, Any], path: str, absent: Any = None) -> Any:
    """The value under a name, or at a dotted path into objects; `absent` where there is none."""
    if path in values:
        return values[path]
    inside: Any = values
    for part in path.split("."):
        if not isinstance(inside, Mapping) or part not in inside:
            return absent
        inside = inside[part]
    return inside


def is_blank(value: object) -> bool:
    """None, NaN, or text of nothing but spaces and characters without width."""
    if isinstance(value, str):
        return all(c.isspace() or unicodedata.category(c) == "Cf" for c in value)
    return value is None or (isinstance(value, float) and math.isnan(value))


def plain_text(value: object) -> str | None:
    """A value as text to be read or written by a model: text as it is, numbers and truth values as JSON has them.

    None for what is no text: None, NaN, lists, objects.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and not math.isnan(value)):
        return repr(value)
    return None


def json_value(value: Any) -> Any:
    """The same value in JSON's types. Dates become ISO 8601 text, decimals numbers, UTF-8 bytes text.

    Raises TypeError for what has no such form (images, audio, bytes that are not text).
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise TypeError(f"{len(value)} bytes that are not text") from error
    if isinstance(value, Sequence):
        return [json_value(inner) for inner in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.timedelta | uuid.UUID):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def is_date(value: object) -> bool:
    return isinstance(value, datetime.date | datetime.time)


def visible(text: str) -> str:
    """The text with what a terminal would obey (escape sequences, a bell …) written out; line breaks and tabs stay."""
    return text.translate(_COMMANDS)


def shorten(text: object, limit: int = 80) -> str:
    """One line of at most `limit` characters for a message, safe to print."""
    line = visible(" ".join(str(text).split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: Sequence[object], limit: int = 12) -> str:
    """``a`, `b`, `c` and 9 more`."""
    shown = ", ".join(f"`{shorten(name, 40)}`" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit:,} more"
