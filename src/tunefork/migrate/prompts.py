"""What a model is asked while it can still answer: conversations without their last reply, from any file of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.data import Finding, Row, apply_layout, read_rows
from tunefork.data.values import is_blank, plain_text
from tunefork.errors import DataError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, as a service is asked it, and the right answer where the file has it."""

    source: str  # "valid.jsonl:12"
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    reference: str | None = None


def read_prompts(
    file: str | Path, text_field: str | None = None, label_field: str | None = None
) -> tuple[list[Prompt], list[Finding]]:
    """Every row of `file` that can be asked: `messages` (its last reply is the reference), or `prompt`, or `text`.

    `text_field` and `label_field` name other columns. Raises MissingFileError or DataError; rows that cannot be used
    are in the findings.
    """
    rows, findings = read_rows(file)
    fields = {name: column for name, column in (("prompt", text_field), ("completion", label_field)) if column}
    laid_out, more = apply_layout(rows, "auto", fields, answers=False)
    raw = {row.source: row.values.get("messages") for row in rows}
    found = [prompt for row in laid_out if (prompt := _prompt(row, raw[row.source])) is not None]
    if not found:
        first = f" The first row has {', '.join(sorted(map(str, rows[0].values)))}." if rows else ""
        raise DataError(
            f"`{file}` must hold rows with messages, prompt or text. Received {len(rows)} without.{first} "
            "Try --text-field with a column's name."
        )
    if missing := len(laid_out) - len(found):
        more.append(Finding("warning", "no-prompt", f"{missing:,} rows have nothing to ask and are left out.", missing))
    return found, [*findings, *more]


def _prompt(row: Row, raw: Any) -> Prompt | None:
    """`raw` are the messages as the file has them, which the model was taught and is asked: parts, names and all."""
    values = row.values
    if isinstance(values.get("messages"), list):
        given = raw if isinstance(raw, list) and all("role" in m for m in raw) else values["messages"]
        messages = [{k: v for k, v in m.items() if k != "weight" and v is not None} for m in given]
        reference = messages.pop().get("content") if messages and messages[-1]["role"] == "assistant" else None
        tools = values.get("tools") or ()
        text = reference if isinstance(reference, str) else None
        return Prompt(row.source, tuple(messages), tuple(tools), text) if messages else None
    asked = next((values[name] for name in ("prompt", "text") if not is_blank(values.get(name))), None)
    text = plain_text(asked)
    if text is None:
        return None
    right = next((values[name] for name in ("completion", "answer", "label") if not is_blank(values.get(name))), None)
    answer = plain_text(right)
    return Prompt(row.source, ({"role": "user", "content": text},), (), None if answer is None else answer.strip())
