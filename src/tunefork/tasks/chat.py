"""Chat: conversations through the model's own template; the assistant's turns are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from tunefork.data.rows import Row
from tunefork.data.values import shorten
from tunefork.errors import DataError
from tunefork.tasks.base import Example, Form, Message, Prediction, Role, Statistic
from tunefork.tasks.spec import SpecTask, TaskSpec
from tunefork.tasks.text import TEXT_METRICS, text_statistics

_PLAIN = ("role", "content", "weight")


class ChatTask(SpecTask):
    """Rows carry `messages` in OpenAI's shape (and perhaps `tools`); `weight: 0` turns are not learned."""

    form: Form = "chat"

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec, (*TEXT_METRICS, "stopped"))
        self.wording: Mapping[str, Any] = {}  # the model's chat template says it all

    def example(self, row: Row, *, labelled: bool = True) -> Example:
        """Raises DataError for a row without messages, or with one that is not of OpenAI's shape."""
        given = row.values.get("messages")
        if not isinstance(given, list) or not given:
            raise DataError(
                f"{row.source}: a chat row must have a list `messages`. Received {shorten(given)}; the row has "
                f"{', '.join(sorted(map(str, row.values)))}. {_advice(row.values)}"
            )
        messages = tuple(chat_message(m, row.source) for m in given)
        last = messages[-1]
        return Example(
            source=row.source,
            text="\n".join(m.content for m in messages),
            messages=messages,
            tools=tuple(row.values.get("tools") or ()),
            references=(last.content,) if labelled and last.role == "assistant" else (),
        )

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        """The loss, and `stopped` where text was generated, are left out where the predictions come without them."""
        return text_statistics(self.metrics, predictions)


def _advice(values: Mapping[str, Any]) -> str:
    if "completion" in values:  # also of rows in the layout alpaca
        return "Try --task generation, which learns prompts and completions, or write them as messages."
    return "Try rows with `messages` (role and content), or ShareGPT's `conversations`, or another --task."


def chat_message(given: Any, source: str) -> Message:
    """A message of OpenAI's shape. Raises DataError for another."""
    if not isinstance(given, Mapping) or given.get("role") not in get_args(Role):
        raise DataError(
            f"{source}: a message's role must be one of {', '.join(get_args(Role))}. Received {shorten(given)}."
        )
    content = given.get("content")
    if not isinstance(content, str | None):
        raise DataError(f"{source}: a message's content must be text. Received {shorten(content)}.")
    extra = {key: value for key, value in given.items() if key not in _PLAIN}
    return Message(given["role"], content or "", given.get("weight", 1) != 0, extra or None)
