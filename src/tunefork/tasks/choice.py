"""Multiple choice: every row brings its own candidates; the most likely one a token is the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tunefork.data.rows import Row
from tunefork.data.values import label_text, plain_text
from tunefork.errors import DataError
from tunefork.metrics import MeanStatistic
from tunefork.metrics.statistics import Statistic
from tunefork.recipe.schema import TaskSection
from tunefork.tasks.base import Example, Prediction, TaskInfo
from tunefork.tasks.labelled import MOST_CANDIDATES
from tunefork.tasks.spec import TaskSpec, look_up, named_values, unrolled
from tunefork.tasks.template import fill


class ChoiceTask:
    """2..n candidates a row, compared by length-normalised log-likelihood after the prompt."""

    labels: tuple[str, ...] = ()
    form: Literal["choice"] = "choice"
    stop: tuple[str, ...] = ()
    max_new_tokens = 8

    def __init__(self, spec: TaskSpec, section: TaskSection) -> None:
        self.spec = spec
        listed = isinstance(spec.choices, str)  # as many as a row has, perhaps dozens (ReCoRD)
        few = not listed and len(spec.choices) <= MOST_CANDIDATES
        fitting: Literal["candidates", "answer"] = "candidates" if few or spec.right == "label" else "answer"
        self.objective: Literal["candidates", "answer"] = fitting if section.objective == "auto" else section.objective
        self.metrics, self.metric = spec.metrics, spec.metrics[0]
        self.info = TaskInfo(spec.name, spec.kind, spec.summary, self.metric, spec.source)

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        return [part for row in rows for part in unrolled(self.spec, row)]

    def label_of(self, row: Row) -> str | None:
        """Positions of right answers are nothing to stratify by."""
        return None

    def example(self, row: Row) -> Example:
        """Raises DataError for a missing field, fewer than two choices, or a right answer that is none of them."""
        values = named_values(self.spec, row)
        texts = list(dict.fromkeys(self._choices(values, row.source)))
        if len(texts) < 2:
            raise DataError(f"{row.source}: a choice needs at least two candidates. Received {len(texts)}.")
        golds = self._right(values, texts, row.source)
        prompt = fill(self.spec.prompt, "task.prompt", values, row.source)
        candidates = tuple(
            fill(self.spec.choice, "task.choice", {**values, "value": text}, row.source) for text in texts
        )
        return Example(
            source=row.source,
            prompt=prompt,
            text=prompt,
            candidates=candidates,
            gold=golds[0] if golds else None,
            golds=golds,
            group=fill(self.spec.group, "task.group", values, row.source) if self.spec.group else "",
        )

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        right = [float(p.index in (p.golds or (p.gold_index,))) for p in predictions]
        return [MeanStatistic("accuracy", right)]

    def _choices(self, values: Mapping[str, Any], source: str) -> list[str]:
        if not isinstance(self.spec.choices, str):
            return [fill(template, "task.choices", values, source) for template in self.spec.choices]
        items = look_up(values, self.spec.choices)
        if isinstance(items, Mapping) and "text" in items:  # as the hub's ARC and OpenBookQA write them
            items = items["text"]
        if not isinstance(items, list):
            raise DataError(
                f"{source}: the field `{self.spec.choices}` must list the choices. Received {items!r}. "
                'Try --set task.choices=["{{ choice1 }}","{{ choice2 }}"].'
            )
        return [
            fill(self.spec.choice_value, "task.choice_value", {**values, "choice": item}, source) for item in items
        ]

    def _right(self, values: Mapping[str, Any], texts: Sequence[str], source: str) -> tuple[int, ...]:
        """Places of the right choices: `right` is an index from 0, a text, or a list of texts."""
        given = look_up(values, self.spec.right)
        if isinstance(given, list):
            wanted = {str(item["text"] if isinstance(item, Mapping) else item) for item in given}
            found = tuple(i for i, text in enumerate(texts) if text in wanted)
            if wanted and not found:
                raise DataError(f"{source}: the right answer must be among the choices. Received {sorted(wanted)!r}.")
            return found
        label = label_text(given)
        if label is None:
            return ()
        if label.isdigit() and int(label) < len(texts):
            return (int(label),)
        text = plain_text(given)
        if text in texts:
            return (texts.index(text),)
        if len(label) == 1 and label.isalpha() and ord(label.upper()) - ord("A") < len(texts):
            return (ord(label.upper()) - ord("A"),)
        raise DataError(
            f"{source}: the right answer must be an index from 0 to {len(texts) - 1}, or one of the choices. "
            f"Received {given!r}."
        )
