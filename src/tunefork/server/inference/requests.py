"""What a request for answers may say, as the specification has it: what is used, what is refused, what is ignored."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from tunefork.server.inference.rows import Sampling
from tunefork.server.inference.shapes import (
    Audio,
    Function,
    Moderation,
    Prediction,
    Tool,
    WebSearch,
    check_list,
    check_messages,
)
from tunefork.server.jobs.requests import Body, Metadata
from tunefork.server.problems import ApiError

Penalty = Annotated[float, Field(ge=-2, le=2)]
Tokens = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1)]


def _of_whole_characters(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("text must be of whole characters. Received half of a surrogate pair.") from None
    return value


Shown = Annotated[dict[str, Any], AfterValidator(_of_whole_characters)]
"""What the model is shown, and `shapes` checks."""


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is hidden here: answers go to whoever asked, over one's own TLS


class Asked(Body):
    """What chat and legacy completions have in common. `null` is as if it were not given."""

    UNUSED: ClassVar[tuple[str, ...]] = ("user",)
    """What changes nothing here; it is checked, and a reply names what was given of it."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[int, Field(ge=-100, le=100)]] | None = None
    max_tokens: Tokens | None = None
    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=4)] | None = None
    user: str | None = None

    @property
    def ignored(self) -> list[str]:
        return sorted(name for name in self.UNUSED if getattr(self, name) is not None)

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def samplings(self, room: int, vocabulary: int, limit: int | None, top: int | None) -> list[Sampling]:
        """One an answer: at most `limit` tokens, and what there is room for. Raises ApiError for a bias of no token."""
        bias = {token: value for token, value in (self.logit_bias or {}).items() if value}
        if wrong := [t for t in bias if not (t.isascii() and t.isdecimal() and int(t) < vocabulary)]:
            message = f"Invalid key in 'logit_bias': {wrong[0][:40]!r}. Keys must be ids of this model's tokens."
            raise ApiError(message, param="logit_bias", code="invalid_value")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        first = secrets.randbits(62) if self.seed is None else self.seed
        return [
            Sampling(
                longest=room if limit is None else min(limit, room),
                seed=(first + number) % 2**63,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                frequency_penalty=self.frequency_penalty or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                bias={int(token): value for token, value in bias.items()},
                stop=stop,
                top=top,
            )
            for number in range(self.answers)
        ]


class ChatAsked(Asked):
    UNUSED = (
        *("audio", "metadata", "moderation", "prediction", "prompt_cache_key", "user"),
        *("prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier"),
        *("store", "verbosity", "web_search_options"),
    )

    messages: Annotated[list[Shown], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Shown], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    functions: Annotated[list[Shown], Field(min_length=1, max_length=128)] | None = None  # as tools once were
    function_call: Literal["none", "auto"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[Literal["text", "audio"]] | None = None

    audio: Audio | None = None
    metadata: Metadata | None = None
    moderation: Moderation | None = None
    prediction: Prediction | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    safety_identifier: Annotated[str, Field(max_length=64)] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    store: bool | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: WebSearch | None = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def offered(self) -> list[Mapping[str, Any]]:
        """The tools that the model is shown."""
        if "none" in (self.tool_choice, self.function_call):
            return []
        return [*(self.tools or ()), *({"type": "function", "function": f} for f in self.functions or ())]

    @property
    def forced(self) -> str | None:
        """The tool that must be called, "" for any of several; None where an answer will do as well."""
        chosen = self.tool_choice or self.function_call
        names = [tool["function"]["name"] for tool in self.offered]
        if chosen == "required" and names:
            return names[0] if len(names) == 1 else ""
        if isinstance(chosen, dict):
            named = chosen.get("function", {}) if self.tool_choice else chosen
            if isinstance(named, dict) and named.get("name") in names:
                return named["name"]
        if chosen not in (None, "none", "auto"):
            param = "tool_choice" if self.tool_choice else "function_call"
            message = f"Invalid '{param}': a tool that must be called has to be a function that is offered."
            raise ApiError(message, param=param, code="invalid_value")
        return None

    def check(self) -> None:
        """Raises ApiError for what would be promised and not held, and for what cannot be meant."""
        check_messages(self.messages)
        check_list("tools", self.tools or (), lambda tool: Tool)
        check_list("functions", self.functions or (), lambda function: Function)
        if self.top_logprobs is not None and not self.logprobs:
            message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
            raise ApiError(message, param="top_logprobs", code="invalid_value")
        if self.response_format is not None and self.response_format.get("type") != "text":
            message = "Answers are not held to a format here: 'response_format' must be {'type': 'text'}."
            raise ApiError(message, param="response_format", code="unsupported_value")
        if "audio" in (self.modalities or ()):
            message = "Answers are text here: 'modalities' must be ['text']."
            raise ApiError(message, param="modalities", code="unsupported_value")


class TextAsked(Asked):
    UNUSED = ("suffix", "user")

    prompt: str | list[str] | list[int] | list[list[int]] | None
    max_tokens: Tokens | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Raises ApiError for what would be promised and not held."""
        if (self.best_of or 0) > self.answers:
            message = "Every answer is returned here: 'best_of' must not be more than 'n'."
            raise ApiError(message, param="best_of", code="unsupported_value")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, as text or as ids."""
        given = self.prompt or ""
        if isinstance(given, str):
            return [given]
        ids = [one for one in given if isinstance(one, int)]
        return [ids] if ids else [one for one in given if not isinstance(one, int)]
