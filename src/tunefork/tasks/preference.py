"""Preference: a conversation and two replies to it, of which the first is the better one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunefork.data.rows import Row
from tunefork.data.values import shorten
from tunefork.errors import DataError
from tunefork.metrics import MeanStatistic
from tunefork.recipe.schema import TaskSection
from tunefork.tasks.base import Example, Form, Objective, Prediction, Statistic
from tunefork.tasks.chat import chat_message
from tunefork.tasks.spec import SpecTask, TaskSpec


class PreferenceTask(SpecTask):
    """Rows carry `messages`, `preferred` and `rejected`. What is learned is the difference of the two replies, held
    to the model as it was before training by `beta` (DPO; Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""

    form: Form = "choice"
    objective: Objective = "preference"
    automatic_objective = False

    def __init__(self, spec: TaskSpec, section: TaskSection) -> None:
        super().__init__(spec, ("loss", "accuracy"))
        self.beta: float | None = section.beta
        self.wording: Mapping[str, Any] = {}  # the model's chat template says it all

    def example(self, row: Row, *, labelled: bool = True) -> Example:
        """Raises DataError for a row that is not laid out as a preference, and for two replies that are the same."""
        values = row.values
        given, replies = values.get("messages"), (values.get("preferred"), values.get("rejected"))
        if not isinstance(given, list) or not all(isinstance(reply, str) and reply.strip() for reply in replies):
            raise DataError(
                f"{row.source}: a preference must have `messages` and two replies. Received "
                f"{', '.join(sorted(map(str, values)))}. Try rows of input, preferred_output and non_preferred_output."
            )
        if replies[0] == replies[1]:
            raise DataError(f"{row.source}: the two replies must differ. Received {shorten(replies[0])} twice.")
        messages = tuple(replace(chat_message(m, row.source), trained=False) for m in given)
        return Example(
            source=row.source,
            text="\n".join([*(m.content for m in messages), *map(str, replies)]),
            candidates=(str(replies[0]), str(replies[1])),
            gold=0 if labelled else None,
            messages=messages,
            tools=tuple(values.get("tools") or ()),
        )

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        """How often the preferred reply is the likelier one, by its mean log-probability a token."""
        return [MeanStatistic("accuracy", [float(p.index == p.gold_index) for p in predictions])]
