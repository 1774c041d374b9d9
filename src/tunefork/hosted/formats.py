"""Training files as services want them: examples as lines of JSON, checked by each service's published rules."""

from __future__ import annotations

import functools
import hashlib
import json
import re
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
_FUNCTION = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Format(Section):
    """One service's rules; formats.yaml says where each is published."""

    name: str
    source: str
    least: int
    most: int = 2**31
    bytes: int = 2**63
    valid_bytes: int = 2**63
    valid_share: float = 1.0
    roles: tuple[str, ...]
    first_system: bool = False
    after: Mapping[str, tuple[str, ...]] = {}
    strict_calls: bool = False
    spoken_end: bool = False
    preferences: bool = False
    one_turn: bool = False


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


def in_format(format: Format, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines as a service writes them: where calls are strict, with ids of nine letters and no text beside them."""
    return [
        {**line, "messages": [_strict(m) for m in line["messages"]]}
        if format.strict_calls and "messages" in line
        else dict(line)
        for line in lines
    ]


def as_bytes(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The file: one line an example, UTF-8."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def check_lines(
    format: Format, lines: Sequence[Mapping[str, Any]], sources: Sequence[str], split: str, train_bytes: int = 2**63
) -> list[Finding]:
    """What the service would refuse: every line that breaks a rule, and a file too small or too large for it.

    `train_bytes`: of the training file, which a validation file may have to be small beside.
    """
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
    if split == "dev" and size > format.valid_share * train_bytes:
        message = (
            f"{format.name} wants a validation file of at most {format.valid_share:.0%} of the training file, and this "
            f"one has {size / max(train_bytes, 1):.0%}."
        )
        advice = "A smaller data.dev_fraction makes it so."
        found.append(Finding("warning", "large-for-its-training-file", message, size, advice=advice, split=split))
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
        wrong = _wrong_messages(format, line["messages"], replied=True)
        return wrong or (_wrong_calls(line) if format.strict_calls else "")
    if not format.preferences:
        return "preferences are not taken"
    if format.one_turn and any(m["role"] not in ("system", "user") for m in line["input"]["messages"]):
        return "a preference may have one turn alone: no reply before those that are compared"
    outputs = (line["preferred_output"], line["non_preferred_output"])
    if any(not str(output[0].get("content") or "").strip() for output in outputs):
        return "a reply is empty"
    return _wrong_messages(format, line["input"]["messages"], replied=False)


def _wrong_messages(format: Format, messages: Sequence[Mapping[str, Any]], *, replied: bool) -> str:
    before = "start" if replied else ""
    for place, message in enumerate(messages, 1):
        role = message["role"]
        if role not in format.roles:
            return f"message {place} has the role {role}, which is none of {', '.join(format.roles)}"
        said = str(message.get("content") or "").strip() or message.get("tool_calls")
        if role in ("user", "assistant") and not said:
            return f"message {place} is empty"
        if format.first_system and role == "system" and place > 1:
            return "a system message may only come first"
        if role not in (allowed := format.after.get(before, format.roles)):
            return f"message {place} is of the {role}, where only {' or '.join(allowed)} may come"
        before = "calls" if message.get("tool_calls") else role
    if replied and not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        return "no reply to learn from"
    if replied != (messages[-1]["role"] == "assistant"):
        return f"the last message must {'' if replied else 'not '}be the assistant's"
    if format.spoken_end and messages[-1].get("tool_calls"):
        return "the last message must be an answer in words, not a call"
    return ""


def _wrong_calls(line: Mapping[str, Any]) -> str:
    """What mistral-common's validator for fine-tuning refuses in tools, calls and their results."""
    for tool in line.get("tools", ()):
        function = tool["function"]
        if not {"name", "description", "parameters"} <= function.keys():
            return "a tool must have name, description and parameters"
    open_calls = 0
    for place, message in enumerate(line["messages"], 1):
        calls = message.get("tool_calls") or ()
        if calls and message.get("content"):
            return f"message {place} has both text and calls"
        if wrong := [c for c in calls if not _FUNCTION.fullmatch(c["function"]["name"])]:
            return f"message {place} calls {wrong[0]['function']['name']!r}, which is no name for a function"
        if message["role"] == "tool" and not message.get("tool_call_id"):
            return f"message {place} does not say which call it answers"
        if message["role"] == "assistant" and open_calls:
            return f"message {place} comes before every call has its result"
        open_calls += len(calls) - (message["role"] == "tool")
        if open_calls < 0:
            return f"message {place} answers no call"
    return "several calls at the end have no result" if open_calls > 1 else ""


def _strict(message: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(message)
    if found.get("tool_calls"):
        found["tool_calls"] = [{**call, "id": _nine(call.get("id"))} for call in found["tool_calls"]]
        found = found if found.get("content") else {k: v for k, v in found.items() if k != "content"}
    return found | ({"tool_call_id": _nine(found["tool_call_id"])} if found.get("tool_call_id") else {})


def _nine(id: Any) -> str:
    """Nine letters and digits that stand for an id, the same for the same one."""
    return hashlib.sha256(str(id).encode()).hexdigest()[:9]


@functools.cache
def _known() -> dict[str, Format]:
    tree = yaml.safe_load((files("tunefork.hosted") / "formats.yaml").read_text(encoding="utf-8"))
    return {name: Format(name=name, **rules) for name, rules in tree.items()}
