"""Conversations: OpenAI's and ShareGPT's shapes, validated and brought to OpenAI's."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tunefork.data.findings import Problem, Tally
from tunefork.data.rows import Row
from tunefork.data.values import is_blank, listed, shorten
from tunefork.errors import DataError, did_you_mean

Renamed = Counter[tuple[str, str]]
"""(role as written, role as used) -> messages"""

OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose text is a call in JSON
SHAREGPT_ROLES = OPENAI_ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    **dict.fromkeys(CALLS, "assistant"),
}
SHAREGPT_ONLY = frozenset(SHAREGPT_ROLES) - frozenset(OPENAI_ROLES)


def conversation(
    row: Row, tally: Tally, renamed: Renamed, *, sharegpt: bool, answers: bool
) -> dict[str, Any] | Problem:
    """The row's values with `messages` (role, content, perhaps weight, tool_calls …) and `tools` as a list.

    With `answers` the last message must be an assistant's, and at least one assistant message must be trained.
    Arguments of calls are objects, as chat templates want them. Raises DataError for a role that is not known.
    """
    key = "conversations" if sharegpt and isinstance(row.values.get("conversations"), list) else "messages"
    given = row.values.get(key)
    if not isinstance(given, list):
        return Problem("missing-field", f"no list `{key}`")
    if not given:
        return Problem("empty-message", f"`{key}` is empty")
    messages: list[dict[str, Any]] = []
    notes: set[str] = set()
    roles: Renamed = Counter()
    for place, raw in enumerate(given, 1):
        message = _message(raw, place, row, sharegpt, roles, notes)
        if isinstance(message, Problem):
            return message
        messages.append(message)
    system = row.values.get("system")
    if sharegpt and isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    problem = _problem(messages, answers)
    if problem:
        return problem
    tools = _tools(row.values.get("tools"))
    if isinstance(tools, Problem):
        return tools
    renamed.update(roles)
    for code in sorted(notes | _oddities(messages)):
        tally.add(code, row.source)
    values = {k: v for k, v in row.values.items() if k != "tools"}
    return {**values, "messages": messages, **({"tools": tools} if tools else {})}


def _message(
    raw: Any, place: int, row: Row, sharegpt: bool, roles: Renamed, notes: set[str]
) -> dict[str, Any] | Problem:
    if not isinstance(raw, Mapping):
        return Problem("bad-message", f"message {place} is not an object")
    rest = {k: v for k, v in raw.items() if v is not None}  # tables give every message every key
    wrote = rest.pop("role", None) or (rest.pop("from", None) if sharegpt else None)
    content = rest.pop("content", None)
    if content is None and sharegpt:
        content = rest.pop("value", None)
    if not isinstance(wrote, str):
        return Problem("bad-message", f"message {place} has no role; its keys are {listed(sorted(raw))}")
    role = _role(wrote, place, row, sharegpt)
    if role != wrote:
        roles[wrote, role] += 1
    if wrote in CALLS:
        content, rest["tool_calls"] = "", content
    elif "function_call" in rest:  # OpenAI's older form of one call
        rest["tool_calls"] = [rest.pop("function_call")]
    if "tool_calls" in rest:
        calls = _calls(rest.pop("tool_calls"), place)
        if isinstance(calls, Problem):
            return calls
        if calls:
            rest["tool_calls"] = calls
    text = _content(content, "tool_calls" in rest, place, notes)
    if isinstance(text, Problem):
        return text
    if "weight" in rest:
        weight = rest["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
            return Problem("bad-message", f"`weight` of message {place} is {weight!r}, not 0 or 1")
        rest["weight"] = int(weight)
    return {"role": role, "content": text, **rest}


def _role(wrote: str, place: int, row: Row, sharegpt: bool) -> str:
    known = SHAREGPT_ROLES if sharegpt else OPENAI_ROLES
    if wrote in known:
        return known[wrote]
    hint = did_you_mean(wrote, known)
    if not sharegpt and wrote in SHAREGPT_ONLY:
        hint = " Try data.layout=sharegpt, which maps it."
    raise DataError(
        f"{row.source}: a role must be one of {listed(list(known), 20)}. Received `{shorten(wrote, 40)}` in message "
        f"{place}.{hint or ' Try renaming it.'}"
    )


def _content(content: Any, has_calls: bool, place: int, notes: set[str]) -> str | Problem:
    if isinstance(content, str):
        return content
    if content is None and has_calls:
        return ""
    if isinstance(content, list) and content:
        texts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in content]
        parts = [text for text in texts if isinstance(text, str)]
        if len(parts) == len(texts):
            if len(parts) > 1:
                notes.add("joined-parts")
            return "\n".join(parts)
        return Problem("bad-message", f"message {place} has a part that is not text")
    what = "nothing" if content is None else type(content).__name__
    return Problem("bad-message", f"the content of message {place} must be text, and is {what}")


def _calls(given: Any, place: int) -> list[dict[str, Any]] | Problem:
    """Tool calls in OpenAI's shape, from a list of them or from the JSON text of one or several."""
    bad = Problem("bad-message", f"message {place} must hold calls with a name and arguments in JSON")
    calls = _from_json(given)
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list):
        return bad
    shaped: list[dict[str, Any]] = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            return bad
        arguments = _from_json(inner.get("arguments") or {})
        if not isinstance(arguments, Mapping):
            return bad
        outer = {k: v for k, v in call.items() if k not in ("function", "name", "arguments")}
        shaped.append({**outer, "type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}})
    return shaped


def _tools(given: Any) -> list[Any] | Problem:
    """Tool definitions as a list; an empty one where there are none."""
    tools = [] if is_blank(given) else _from_json(given)
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return Problem("bad-message", "`tools` must be a list of objects, or such a list as JSON text")
    return tools


def _from_json(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return None


def _problem(messages: Sequence[Mapping[str, Any]], answers: bool) -> Problem | None:
    for place, message in enumerate(messages, 1):
        empty = is_blank(message["content"]) and not message.get("tool_calls")
        learned = message["role"] == "assistant" and message.get("weight", 1) != 0
        if empty and (message["role"] == "user" or learned):
            return Problem("empty-message", f"message {place}, of the {message['role']}, is empty")
    if not answers:
        return None
    last = messages[-1]["role"]
    if last != "assistant":
        spoken = [m["role"] for m in messages if m["role"] != "system"]
        swapped = last == "user" and spoken[0] == "assistant"
        return Problem("nothing-to-train", f"the last message is the {last}'s{' (roles swapped?)' if swapped else ''}")
    if all(m.get("weight", 1) == 0 for m in messages if m["role"] == "assistant"):
        return Problem("nothing-to-train", "every assistant message has `weight` 0")
    return None


def _oddities(messages: Sequence[Mapping[str, Any]]) -> set[str]:
    roles = [m["role"] for m in messages]
    found: set[str] = set()
    if any(a == b == "user" for a, b in itertools.pairwise(roles)):
        found.add("user-twice")
    if "system" in roles[1:]:
        found.add("late-system")
    if next((role for role in roles if role != "system"), "") == "assistant":
        found.add("assistant-first")
    if any(m["role"] == "system" and is_blank(m["content"]) for m in messages):
        found.add("empty-system")
    return found
