"""How rows are laid out: told from their keys, and brought to one set of field names a layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from tunefork.data.chats import SHAREGPT_ONLY, Renamed, conversation
from tunefork.data.findings import Problem, Tally
from tunefork.data.rows import Finding, Row
from tunefork.data.values import is_blank, listed, look_up, plain_text
from tunefork.errors import DataError, did_you_mean
from tunefork.recipe.schema import Layout

_KEYS: dict[str, tuple[str, ...]] = {
    "openai": ("messages",),
    "sharegpt": ("conversations", "messages"),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("preferred_output", "non_preferred_output"),
}
NAMES = frozenset({key for keys in _KEYS.values() for key in keys} | {"text", "input", "tools", "system"})
_MISSING = object()


def detect_layout(rows: Sequence[Row], fields: Mapping[str, str] | None = None) -> Layout:
    """The layout all rows share, told from their keys, and the names that `fields` gives to columns.

    `messages` is openai or sharegpt by the roles inside, `conversations` sharegpt, `instruction` with `output` alpaca,
    `prompt` with `completion` prompt_completion, `preferred_output` with `non_preferred_output` preference, `text`
    alone text, anything else columns. A row that lacks part of its layout's keys does not change the layout. Raises
    DataError naming the first row of a second layout.
    """
    first: tuple[Layout, Row] | None = None
    plain: list[Row] = []
    only_text = True
    for row in _with_fields(rows, fields or {}, Tally(), answers=True):
        layout = _layout_of(row.values)
        if layout is None:
            plain.append(row)
            only_text = only_text and set(row.values) == {"text"}
        elif first is None:
            first = layout, row
        elif layout != first[0]:
            if (
                {layout, first[0]} == {"openai", "sharegpt"}
                and "messages" in row.values
                and "messages" in first[1].values
            ):
                first = "sharegpt", first[1]  # same shape; only some rows use the roles that need mapping
                continue
            _refuse_mixed(first[0], first[1], layout, row)
    if first is None:
        return "text" if only_text and plain else "columns"
    for row in plain:
        if not any(key in row.values for key in _KEYS[first[0]]):
            _refuse_mixed(first[0], first[1], "columns", row)
    return first[0]


def _layout_of(values: Mapping[str, Any]) -> Layout | None:
    messages = values.get("messages")
    if isinstance(messages, list):
        mapped = any(isinstance(m, Mapping) and ("from" in m or m.get("role") in SHAREGPT_ONLY) for m in messages)
        return "sharegpt" if mapped else "openai"
    if isinstance(values.get("conversations"), list):
        return "sharegpt"
    if "instruction" in values and "output" in values:
        return "alpaca"
    if all(key in values for key in _KEYS["preference"]):
        return "preference"
    return "prompt_completion" if "prompt" in values and "completion" in values else None


def _refuse_mixed(layout: str, row: Row, other: str, offending: Row) -> NoReturn:
    raise DataError(
        f"All rows of a file must share one layout. Received {layout} ({row.source}) and, from {offending.source}, "
        f"{other} with the keys {listed(sorted(offending.values), 6)}. Try one file a layout, or set data.layout."
    )


def apply_layout(
    rows: Sequence[Row], layout: Layout, fields: Mapping[str, str], *, answers: bool = True
) -> tuple[list[Row], list[Finding]]:
    """The same rows with the layout's field names beside their own columns.

    First each name of `fields` gets the value of its column (a dotted path reaches into objects); then the layout adds
    `prompt` and `completion` (prompt_completion, alpaca), `messages` in OpenAI's shape and `tools` as a list
    (sharegpt, openai), `preferred` and `rejected` beside them (preference), or nothing (columns). A `text` (text) is a
    completion without a prompt. Rows that cannot be used are left out, with findings. Without `answers`, as for
    prediction, what is learned may be missing (label columns, completions, the last reply), and a `text` is a prompt.

    Raises DataError for a column no row has, a role that is not known, or mixed layouts under `auto`.
    """
    tally = Tally()
    named = _with_fields(rows, fields, tally, answers)
    if layout == "auto":
        layout = detect_layout(named)
    renamed: Renamed = Counter()
    swapped = 0
    laid_out: list[Row] = []
    for row in named:
        values = _laid_out(row, layout, tally, renamed, answers)
        if isinstance(values, Problem):
            tally.add(values.code, row.source, values.what)
            swapped += values.code == "nothing-to-train" and "swapped" in values.what
            continue
        laid_out.append(replace(row, values=values) if values is not row.values else row)
    findings = tally.findings()
    if renamed:
        what = ", ".join(f"`{old}` to `{new}` ({count:,})" for (old, new), count in renamed.most_common())
        findings.append(Finding("info", "roles-mapped", f"Roles mapped: {what}.", sum(renamed.values())))
    if swapped * 2 > len(named):
        message = f"{swapped:,} of {len(named):,} conversations begin with the assistant and end with the user."
        advice = "The roles look swapped: exchange them, so that each conversation ends with the reply to be learned."
        findings.append(Finding("error", "swapped-roles", message, swapped, advice=advice))
    return laid_out, findings


def _with_fields(rows: Sequence[Row], fields: Mapping[str, str], tally: Tally, answers: bool) -> list[Row]:
    if not fields or not rows:
        return list(rows)
    absent = [
        name
        for name, column in fields.items()
        if all(look_up(row.values, column, _MISSING) is _MISSING for row in rows)
    ]
    if absent and (answers or len(absent) == len(fields)):
        columns = list(dict.fromkeys(key for row in rows[:1000] for key in row.values))
        column = fields[absent[0]]
        raise DataError(
            f"`{rows[0].file}` must have the column `{column}` (data.fields.{absent[0]}). Received the columns "
            f"{listed(columns)}.{did_you_mean(column, columns)} Try naming one of them."
        )
    named: list[Row] = []
    for row in rows:
        values = {name: look_up(row.values, column, _MISSING) for name, column in fields.items()}
        missing = [fields[name] for name, value in values.items() if value is _MISSING]
        if missing and answers:
            tally.add("missing-field", row.source, f"no {listed(missing)}")
            continue
        found = {name: value for name, value in values.items() if value is not _MISSING}
        named.append(replace(row, values={**row.values, **found}))
    return named


def _laid_out(row: Row, layout: Layout, tally: Tally, renamed: Renamed, answers: bool) -> Mapping[str, Any] | Problem:
    if layout in ("openai", "sharegpt"):
        return conversation(row, tally, renamed, sharegpt=layout == "sharegpt", answers=answers)
    if layout == "preference":
        return _preference(row, tally, renamed)
    if layout == "alpaca":
        return _alpaca(row, answers)
    if layout == "prompt_completion":
        return _pair(row, "prompt", "completion", answers)
    if layout == "text":
        text = _required(row.values, "text")
        if isinstance(text, Problem):
            return text
        return {**row.values, "text": text, **({"prompt": "", "completion": text} if answers else {"prompt": text})}
    return row.values


def _preference(row: Row, tally: Tally, renamed: Renamed) -> Mapping[str, Any] | Problem:
    """OpenAI's shape: `input` with messages, and two outputs of one message of the assistant each."""
    given, replies = row.values.get("input"), []
    if not isinstance(given, Mapping):
        return Problem("missing-field", "no object `input`")
    asked = conversation(replace(row, values=given), tally, renamed, sharegpt=False, answers=False)
    if isinstance(asked, Problem):
        return asked
    for key in _KEYS["preference"]:
        values = {"messages": row.values.get(key)}
        output = conversation(replace(row, values=values), Tally(), renamed, sharegpt=False, answers=True)
        if isinstance(output, Problem):
            return Problem(output.code, f"in `{key}`, {output.what}")
        if len(output["messages"]) != 1 or output["messages"][0].get("tool_calls"):
            return Problem("bad-message", f"`{key}` is not one message of text")
        replies.append(output["messages"][0]["content"])
    return {**asked, "preferred": replies[0], "rejected": replies[1]}


def _alpaca(row: Row, answers: bool) -> Mapping[str, Any] | Problem:
    more = row.values.get("input")
    extra = "" if is_blank(more) else plain_text(more)
    if extra is None:
        return Problem("not-text", f"`input` is {_kind(more)}")
    values = _pair(row, "instruction", "output", answers)
    if not isinstance(values, Problem) and extra:
        values["prompt"] += "\n\n" + extra
    return values


def _pair(row: Row, prompt: str, completion: str, answers: bool) -> dict[str, Any] | Problem:
    question = _required(row.values, prompt)
    if isinstance(question, Problem):
        return question
    answer = _required(row.values, completion)
    if not isinstance(answer, Problem):
        return {**row.values, "prompt": question, "completion": answer}
    if answers:
        return answer
    return {**{k: v for k, v in row.values.items() if k != "completion"}, "prompt": question}


def _required(values: Mapping[str, Any], name: str) -> str | Problem:
    if name not in values:
        return Problem("missing-field", f"no `{name}`")
    value = values[name]
    if is_blank(value):
        return Problem("empty-field", f"`{name}` is empty")
    text = plain_text(value)
    return Problem("not-text", f"`{name}` is {_kind(value)}") if text is None else text


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, Mapping) else type(value).__name__
