"""Training files as services want them: examples as lines of JSON, checked by each service's published rules."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml

from tunefork.data import Finding
from tunefork.data.values import counted
from tunefork.errors import RecipeError, did_you_mean
from tunefork.hosted.asking import as_json, system_message
from tunefork.recipe.schema import Section
from tunefork.render.messages import asked_messages, taught_messages
from tunefork.tasks.base import Example, Message, Task

_SHOWN = 5


class Format(Section):
    """One service's rules; formats.yaml says where each is published."""

    name: str
    source: str
    least: int
    most: int = 2**31
    bytes: int = 2**63
    valid_bytes: int = 2**63
    roles: tuple[str, ...]
    first_system: bool = False
    turns: bool = False
    preferences: bool = False


def find_format(name: str) -> Format:
    """Raises RecipeError with a did-you-mean for a service without one."""
    known = _known()
    if name not in known:
        raise RecipeError(
            f"A format must be one of {', '.join(known)}. Received {name!r}."
            + (did_you_mean(name, known) or " Try openai.")
        )
    return known[name]


def training_lines(task: Task, examples: Sequence[Example], system: str | None) -> list[dict[str, Any]]:
    """One object an example: the conversation that `HostedAsking` will ask, with its right answer; or a preference."""
    lines = []
    for example in examples:
        before = system_message(task, example, system)
        tools = {"tools": [dict(tool) for tool in example.tools]} if example.tools else {}
        if task.objective == "preference":
            replies = [as_json([Message("assistant", candidate)]) for candidate in example.candidates]
            asked = {"messages": as_json((*before, *asked_messages(example))), **tools}
            lines.append({"input": asked, "preferred_output": replies[0], "non_preferred_output": replies[1]})
        else:
            lines.append({"messages": as_json((*before, *taught_messages(example)), weights=True), **tools})
    return lines


def as_bytes(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The file: one line an example, UTF-8."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def check_lines(
    format: Format, lines: Sequence[Mapping[str, Any]], sources: Sequence[str], split: str
) -> list[Finding]:
    """What the service would refuse: every line that breaks a rule, and a file too small or too large for it."""
    wrong: list[str] = []
    for line, source in zip(lines, sources, strict=True):
        if why := _problem(format, line):
            wrong.append(f"{source}: {why}")
    found = []
    if wrong:
        message = f"{counted(len(wrong), 'row')} break the rules of {format.name}."
        advice = f"The rules are those of {format.source}."
        found.append(Finding("error", "refused-by-service", message, len(wrong), tuple(wrong[:_SHOWN]), advice, split))
    size, most = len(as_bytes(lines)), format.bytes if split == "train" else format.valid_bytes
    if split == "train" and not format.least <= len(lines) <= format.most:
        message = (
            f"{format.name} takes at least {format.least:,} examples and at most {format.most:,}, not {len(lines):,}."
        )
        found.append(Finding("error", "too-few-or-many", message, len(lines), split=split))
    if size > most:
        message = f"{format.name} takes files of up to {most:,} bytes, and this one has {size:,}."
        found.append(Finding("error", "file-too-large", message, size, split=split))
    return found


def _problem(format: Format, line: Mapping[str, Any]) -> str:
    """Why a line is refused; empty where it is not."""
    if "messages" in line:
        return _wrong_messages(format, line["messages"], replied=True)
    if not format.preferences:
        return "preferences are not taken"
    outputs = (line["preferred_output"], line["non_preferred_output"])
    if any(not str(output[0].get("content") or "").strip() for output in outputs):
        return "a reply is empty"
    return _wrong_messages(format, line["input"]["messages"], replied=False)


def _wrong_messages(format: Format, messages: Sequence[Mapping[str, Any]], *, replied: bool) -> str:
    roles = [m["role"] for m in messages]
    for place, message in enumerate(messages, 1):
        if message["role"] not in format.roles:
            return f"message {place} has the role {message['role']}, which is none of {', '.join(format.roles)}"
        said = str(message.get("content") or "").strip() or message.get("tool_calls")
        if message["role"] in ("user", "assistant") and not said:
            return f"message {place} is empty"
    if format.first_system and "system" in roles[1:]:
        return "a system message may only come first"
    if replied and not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        return "no reply to learn from"
    if replied and roles[-1] != "assistant":
        return "the last message must be the assistant's"
    speakers = [role for role in roles if role in ("user", "assistant")]
    plain = "tool" not in roles and not any(m.get("tool_calls") for m in messages)
    if format.turns and plain and speakers != [("user", "assistant")[i % 2] for i in range(len(speakers))]:
        return "user and assistant must take turns, and the user begins"
    return ""


@functools.cache
def _known() -> dict[str, Format]:
    tree = yaml.safe_load((files("tunefork.hosted") / "formats.yaml").read_text(encoding="utf-8"))
    return {name: Format(name=name, **rules) for name, rules in tree.items()}
