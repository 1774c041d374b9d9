"""Chat: conversations through the model's own template; the assistant's turns are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tunefork.data.rows import Row
from tunefork.errors import DataError, RecipeError
from tunefork.metrics import MeanStatistic
from tunefork.metrics.statistics import Statistic
from tunefork.tasks.base import Example, Message, Prediction, TaskInfo
from tunefork.tasks.spec import TaskSpec
from tunefork.tasks.text import TEXT_METRICS, text_statistic

_PLAIN = ("role", "content", "weight")


class ChatTask:
    """Rows carry `messages` in OpenAI's shape (and perhaps `tools`); `weight: 0` turns are not learned."""

    labels: tuple[str, ...] = ()
    form: Literal["chat"] = "chat"
    objective: Literal["answer"] = "answer"

    def __init__(self, spec: TaskSpec) -> None:
        unknown = [m for m in spec.metrics if m not in (*TEXT_METRICS, "stopped")]
        if unknown:
            raise RecipeError(f"`task.metric` of chat must be loss, stopped or one of text. Received {unknown[0]!r}.")
        self.spec, self.stop, self.max_new_tokens = spec, spec.stop, spec.max_new_tokens
        self.metrics, self.metric = spec.metrics, spec.metrics[0]
        self.info = TaskInfo(spec.name, spec.kind, spec.summary, self.metric, spec.source)

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)

    def label_of(self, row: Row) -> str | None:
        return None

    def example(self, row: Row) -> Example:
        """Raises DataError for a row without messages."""
        given = row.values.get("messages")
        if not isinstance(given, list) or not given:
            raise DataError(f"{row.source}: a chat row must have `messages`. Received {sorted(row.values)}.")
        messages = tuple(_message(m) for m in given)
        last = messages[-1]
        return Example(
            source=row.source,
            text="\n".join(m.content for m in messages),
            messages=messages,
            tools=tuple(row.values.get("tools") or ()),
            references=(last.content,) if last.role == "assistant" else (),
        )

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        found: list[Statistic] = []
        for metric in self.metrics:
            if metric == "stopped":
                if all(p.stopped is not None for p in predictions):
                    found.append(MeanStatistic("stopped", [float(bool(p.stopped)) for p in predictions]))
            else:
                found.append(text_statistic(metric, predictions))
        return found


def _message(given: Mapping[str, Any]) -> Message:
    extra = {key: value for key, value in given.items() if key not in _PLAIN}
    return Message(given["role"], given.get("content") or "", given.get("weight", 1) != 0, extra or None)
