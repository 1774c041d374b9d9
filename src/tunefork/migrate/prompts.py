"""What a model is asked while it can still answer: conversations without their last reply, from any file of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    file: str | Path, text_field: str | None = None, label_field: str | None = None, system: str | None = None
) -> tuple[list[Prompt], list[Finding]]:
    """Every row of `file` that can be asked: `messages` (its last reply is the reference), or `prompt`, or `text`.

    `text_field` and `label_field` name other columns; `system` is put before every prompt. Raises MissingFileError or
    DataError; rows that cannot be used are in the findings.
    """
    rows, findings = read_rows(file)
    fields = {name: column for name, column in (("prompt", text_field), ("completion", label_field)) if column}
    laid_out, more = apply_layout([row for row in rows if not _is_seen(row)], "auto", fields, answers=False)
    usable = {row.source: row for row in (*laid_out, *filter(_is_seen, rows))}
    raw = {row.source: row.values.get("messages") for row in rows}
    prompts = [_prompt(usable[source], raw[source]) for source in raw if source in usable]
    found = [prompt for prompt in prompts if prompt is not None]
    if system:
        found = [replace(p, messages=({"role": "system", "content": system}, *p.messages)) for p in found]
    if not found:
        first = f" The first row has {', '.join(sorted(map(str, rows[0].values)))}." if rows else ""
        raise DataError(
            f"`{file}` must hold rows with messages, prompt or text. Received {len(rows)} without.{first} "
            "Try --text-field with a column's name."
        )
    if missing := len(usable) - len(found):
        more.append(Finding("warning", "no-prompt", f"{missing:,} rows have nothing to ask and are left out.", missing))
    return found, [*findings, *more]


def _is_seen(row: Row) -> bool:
    """Whether a conversation holds an image or a sound, which layouts, made for training here, do not know."""
    messages = row.values.get("messages")
    given = [m for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    kinds = {
        p.get("type")
        for m in given
        if isinstance(m.get("content"), list)
        for p in m["content"]
        if isinstance(p, Mapping)
    }
    return len(given) > 0 and all("role" in m for m in given) and not kinds <= {"text"}


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
