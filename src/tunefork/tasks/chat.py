"""Chat: conversations through the model's own template; the assistant's turns are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from tunefork.data.rows import Row
from tunefork.data.values import shorten
from tunefork.errors import DataError, RecipeError, did_you_mean
from tunefork.tasks.base import Example, Form, Message, Objective, Prediction, Role, Statistic, TaskInfo
from tunefork.tasks.spec import TaskSpec
from tunefork.tasks.text import TEXT_METRICS, text_statistics

_PLAIN = ("role", "content", "weight")
_METRICS = (*TEXT_METRICS, "stopped")


class ChatTask:
    """Rows carry `messages` in OpenAI's shape (and perhaps `tools`); `weight: 0` turns are not learned."""

    labels: tuple[str, ...] = ()
    form: Form = "chat"
    objective: Objective = "answer"
    automatic_objective = True

    def __init__(self, spec: TaskSpec) -> None:
        for metric in spec.metrics:
            if metric not in _METRICS:
                raise RecipeError(
                    f"`task.metric` must be one of {', '.join(_METRICS)} for chat. Received {metric!r}."
                    f"{did_you_mean(metric, _METRICS)}"
                )
        self.spec, self.stop, self.max_new_tokens = spec, spec.stop, spec.max_new_tokens
        self.metrics, self.metric = spec.metrics, spec.metrics[0]
        self.info = TaskInfo(spec.name, spec.kind, spec.summary, self.metric, spec.source)
        self.wording: Mapping[str, Any] = {}  # the model's chat template says it all

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)

    def label_of(self, row: Row) -> str | None:
        return None

    def example(self, row: Row) -> Example:
        """Raises DataError for a row without messages, or with one that is not of OpenAI's shape."""
        given = row.values.get("messages")
        if not isinstance(given, list) or not given:
            raise DataError(
                f"{row.source}: a chat row must have a list `messages`. Received {shorten(given)}; the row has "
                f"{', '.join(sorted(map(str, row.values)))}. Try --layout sharegpt or openai."
            )
        messages = tuple(_message(m, row.source) for m in given)
        last = messages[-1]
        return Example(
            source=row.source,
            text="\n".join(m.content for m in messages),
            messages=messages,
            tools=tuple(row.values.get("tools") or ()),
            references=(last.content,) if last.role == "assistant" else (),
        )

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        """The loss, and `stopped` where text was generated, are left out where the predictions come without them."""
        return text_statistics(self.metrics, predictions)


def _message(given: Any, source: str) -> Message:
    if not isinstance(given, Mapping) or given.get("role") not in get_args(Role):
        raise DataError(
            f"{source}: a message's role must be one of {', '.join(get_args(Role))}. Received {shorten(given)}."
        )
    content = given.get("content")
    if not isinstance(content, str | None):
        raise DataError(f"{source}: a message's content must be text. Received {shorten(content)}.")
    extra = {key: value for key, value in given.items() if key not in _PLAIN}
    return Message(given["role"], content or "", given.get("weight", 1) != 0, extra or None)
