"""Problems of single rows, counted by kind as rows are read and laid out; and thresholds that make them errors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from tunefork.data.rows import Finding
from tunefork.data.values import counted, shorten
from tunefork.recipe.schema import DataSection

SHOWN = 5


class Problem(NamedTuple):
    """Why a row cannot be used: a code of KINDS, and the particulars."""

    code: str
    what: str


class Kind(NamedTuple):
    """One kind of finding: `what` follows the number of rows."""

    level: Literal["warning", "info"]
    what: str
    advice: str = ""
    noun: str = "row"


KINDS: dict[str, Kind] = {
    "unreadable-row": Kind("warning", "left out: cannot be read.", "Mend these lines, or remove them."),
    "missing-field": Kind("warning", "left out: a field is missing.", "Fill in the field, or remove these rows."),
    "empty-field": Kind("warning", "left out: a field is empty.", "Fill in the field, or remove these rows."),
    "not-text": Kind("warning", "left out: a field is not text.", "Write the field as a string."),
    "bad-message": Kind(
        "warning",
        "left out: a message is not of the form the layout asks for.",
        "A message needs a role and a text, and `weight` may only be 0 or 1.",
    ),
    "empty-message": Kind("warning", "left out: a message is empty.", "Fill in the message, or remove the row."),
    "nothing-to-train": Kind(
        "warning",
        "left out: no reply to learn from.",
        "A conversation must end with an assistant message whose `weight` is not 0.",
    ),
    "user-twice": Kind(
        "warning",
        "with two user messages in a row.",
        "Check that no reply is missing; some chat templates refuse this.",
    ),
    "assistant-first": Kind(
        "warning", "where the assistant speaks first.", "Check the roles; some chat templates refuse this."
    ),
    "late-system": Kind(
        "warning",
        "with a system message that is not the first.",
        "Some chat templates drop or refuse it; move it first.",
    ),
    "joined-parts": Kind("info", "with a message in several text parts, joined by line breaks."),
    "empty-system": Kind("info", "with an empty system message, kept as it is."),
    "not-json-number": Kind(
        "warning", "with NaN or Infinity, which JSON does not have: read as missing.", "Write null, or a number."
    ),
    "long-row": Kind("warning", "of more than a million characters, kept.", "Check that lines were not joined."),
    "blank-line": Kind("info", "skipped: blank.", noun="line"),
    "date-as-text": Kind("info", "with dates, read as ISO 8601 text such as 2026-01-31."),
    "spreadsheet-error": Kind(
        "warning", "with a spreadsheet error such as #REF!, read as missing.", "Mend the formula."
    ),
    "formula-without-value": Kind(
        "warning",
        "with a formula whose result is not stored in the file, read as missing.",
        "Open and save the file in a spreadsheet program, or export it as CSV.",
    ),
}

LEFT_OUT = frozenset(code for code, kind in KINDS.items() if kind.what.startswith("left out"))


class Tally:
    """Counts problems by kind and keeps the first few of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, code: str, where: str, what: object = "") -> None:
        """One more row (at `where`, a `file:line`) with the problem `code` of KINDS."""
        count, examples = self._found.get(code, (0, []))
        if len(examples) < SHOWN:
            examples.append(f"{where}: {shorten(what, 160)}" if what else where)
        self._found[code] = (count + 1, examples)

    @property
    def left_out(self) -> int:
        return sum(count for code, (count, _) in self._found.items() if code in LEFT_OUT)

    def first(self) -> str:
        """The first example of a row that was left out, or an empty string."""
        return next((shown[0] for code, (_, shown) in self._found.items() if code in LEFT_OUT), "")

    def findings(self) -> list[Finding]:
        return [self._finding(code) for code in self._found]

    def _finding(self, code: str) -> Finding:
        kind, (count, examples) = KINDS[code], self._found[code]
        return Finding(
            kind.level, code, f"{counted(count, kind.noun)} {kind.what}", count, tuple(examples), kind.advice
        )


def refuse_above(
    findings: Iterable[Finding], codes: Collection[str], total: int, limit: float, setting: str
) -> list[Finding]:
    """The findings, those of `codes` as errors where together they touch more than `limit` of `total` rows."""
    findings = list(findings)
    touched = sum(f.count for f in findings if f.code in codes)
    if not total or touched / total <= limit:
        return findings
    note = f"That is {touched / total:.1%} of {counted(total, 'row')}; `data.{setting}` allows {limit:.1%}."
    return [replace(f, level="error", advice=f"{f.advice} {note}".strip()) if f.code in codes else f for f in findings]


def refuse_shares(
    findings: Iterable[Finding], codes: Collection[str], counts: Mapping[str, int], section: DataSection, setting: str
) -> list[Finding]:
    """`refuse_above` split by split (`counts` rows each), where those carved from one file are judged as one."""
    found, limit = list(findings), getattr(section, setting)
    carved = {"train", *(split for split in counts if getattr(section, split) is None)}
    for splits in (carved, *({split} for split in counts if split not in carved)):
        total = sum(counts[split] for split in counts if split in splits)
        judged = iter(refuse_above([f for f in found if f.split in splits], codes, total, limit, setting))
        found = [next(judged) if f.split in splits else f for f in found]
    return found


def about_rows(
    level: Literal["error", "warning"],
    code: str,
    places: Sequence[tuple[str, str]],
    what: str,
    advice: str,
    split: str = "",
    count: int | None = None,
) -> list[Finding]:
    """`3 rows {what}`, with the first few of `places` (where, what) as examples; nothing where there are none."""
    if not places:
        return []
    count = len(places) if count is None else count
    examples = tuple(f"{where}: {shorten(text, 100)}" for where, text in places[:SHOWN])
    return [Finding(level, code, f"{counted(count, 'row')} {what}", count, examples, advice, split)]
