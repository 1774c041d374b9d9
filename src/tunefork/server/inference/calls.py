"""Tool calls, read back out of what a model writes when it was offered tools.

A tokenizer that says how its replies are written (transformers' `response_template`) is asked. For all others the
widespread forms are recognised by themselves:

<tool_call>{"name": …, "arguments": {…}}</tool_call>    Hermes, Qwen
{"name": …, "parameters": {…}}                          Llama, also after <|python_tag|>; nothing before it
[TOOL_CALLS] [{"name": …, "arguments": {…}}]            Mistral; newer ones write [TOOL_CALLS]name[ARGS]{…}

What is no call of a tool that was offered stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|python_tag|>")
_MARK = "|".join(map(re.escape, _MARKS))
_OPENING = re.compile(rf"\A\s*[\[{{]|\s*(?:{_MARK})")
_BEGUN = re.compile(rf"\s*(?:{'|'.join(re.escape(mark[:n]) for mark in _MARKS for n in range(1, len(mark)))})?\Z")
_BETWEEN = re.compile(rf"(?:[\s,;]|{_MARK})*")
_NAME = re.compile(r"([\w.-]+)\s*(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str
    """JSON"""


class CallReader:
    """One reply as it comes, special tokens and all: `feed` gives the text that can be told, `close` all the rest."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> None:
        """`prompt` and `tools` are what the model was shown."""
        self.tokenizer, self.prompt, self.tools = tokenizer, prompt, tools
        self.names = {tool["function"]["name"] for tool in tools}
        self._templated = bool(getattr(tokenizer, "response_template", None))  # older transformers have none
        unseen = [re.escape(token) for token in tokenizer.all_special_tokens if token not in _MARKS]
        self._unseen = re.compile("|".join(unseen) or "(?!)")
        self._text, self._told = "", 0

    def feed(self, text: str) -> str:
        """What may begin a call waits; under a `response_template`, all does."""
        self._text += text
        begin = self._told
        found = None if self._templated else _OPENING.search(self._text, begin) or _BEGUN.search(self._text, begin)
        self._told = found.start() if found else begin
        return self._shown(self._text[begin : self._told])

    def close(self) -> tuple[str, list[Call]]:
        """The text that has not been told, and the calls."""
        held = self._text[self._told :]
        text, calls = self._by_template(held) if self._templated else ("", _calls(held))
        if calls and all(call.name in self.names for call in calls):
            return text, calls
        return self._shown(held), []

    def _by_template(self, text: str) -> tuple[str, list[Call]]:
        try:
            found = self.tokenizer.parse_response(text, prefix=list(self.prompt), tools=list(self.tools))
        except (ValueError, LookupError):
            return "", []
        calls = [_call(call.get("function", call)) for call in found.get("tool_calls", ())]
        return found.get("content", ""), [call for call in calls if call]

    def _shown(self, text: str) -> str:
        return self._unseen.sub("", text)


def _calls(text: str) -> list[Call]:
    """All of them; none where there is anything else in the text."""
    found: list[Call | None] = []
    at = _beyond(text, 0)
    while at < len(text):
        name = _NAME.match(text, at)
        try:
            value, at = json.JSONDecoder().raw_decode(text, name.end() if name else at)
        except (ValueError, RecursionError):
            return []
        values = [{"name": name[1], "arguments": value}] if name else value if isinstance(value, list) else [value]
        found += [_call(value) for value in values]
        at = _beyond(text, at)
    return [] if None in found else [call for call in found if call]


def _beyond(text: str, at: int) -> int:
    found = _BETWEEN.match(text, at)
    return found.end() if found else at


def _call(value: Any) -> Call | None:
    """Arguments that are text already are taken for JSON, as OpenAI writes them."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return Call(value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
