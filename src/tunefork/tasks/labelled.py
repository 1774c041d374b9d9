"""Classification and ordinal scoring: a fixed set of labels, the same for every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from tunefork.data.rows import Row
from tunefork.data.values import label_text, listed
from tunefork.errors import DataError, did_you_mean
from tunefork.metrics import AgreementStatistic, ConfusionStatistic
from tunefork.metrics.statistics import Statistic
from tunefork.recipe.schema import ModelKind, TaskSection
from tunefork.tasks.base import Example, Prediction, TaskInfo
from tunefork.tasks.spec import TaskSpec, named_values, unrolled
from tunefork.tasks.template import fill

MOST_CANDIDATES = 8  # with more, training looks at the right answer only


class LabelledTask:
    """One label of `labels` a row, as a word after a prompt or through a head. `scoring` labels are integers in order."""

    stop: tuple[str, ...] = ()
    max_new_tokens = 8

    def __init__(
        self,
        spec: TaskSpec,
        section: TaskSection,
        model_kind: ModelKind,
        labels: tuple[str, ...],
        names: Mapping[str, str],
    ) -> None:
        self.spec, self.model_kind, self.labels = spec, model_kind, labels
        self._index = {value: labels.index(name) for value, name in names.items()}
        self._own_prompt = section.prompt is not None
        head = section.form == "head" or (section.form == "auto" and model_kind == "encoder")
        self.form: Literal["verbalizer", "head"] = "head" if head else "verbalizer"
        few: Literal["candidates", "answer"] = "candidates" if len(labels) <= MOST_CANDIDATES else "answer"
        self.objective: Literal["candidates", "answer"] = few if section.objective == "auto" else section.objective
        self.metrics, self.metric = spec.metrics, spec.metrics[0]
        self.info = TaskInfo(spec.name, spec.kind, spec.summary, self.metric, spec.source)

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        return [part for row in rows for part in unrolled(self.spec, row)]

    def example(self, row: Row) -> Example:
        """Raises DataError for a missing field or an unknown label; a missing label gives `gold` None."""
        values = named_values(self.spec, row)
        text = fill(self.spec.text, "task.text", values, row.source)
        masked = self.model_kind == "masked" and self.form == "verbalizer"
        template, key = (
            (self.spec.masked_prompt, "task.masked_prompt") if masked else (self.spec.prompt, "task.prompt")
        )
        plain = self.form == "head" and not self._own_prompt
        prompt = text if plain else fill(template, key, values, row.source)
        if not text.strip():
            raise DataError(f"{row.source}: the text must not be empty.")
        space = "" if prompt[-1:].isspace() else " "  # a word follows a word after one space, or begins a line
        return Example(
            source=row.source,
            prompt=prompt,
            text=text,
            candidates=tuple(space + name for name in self.labels),
            gold=self._gold(values, row.source),
            group=fill(self.spec.group, "task.group", values, row.source) if self.spec.group else "",
        )

    def label_of(self, row: Row) -> str | None:
        """The label's name, or None where it is missing or unknown: what a split is stratified by."""
        label = label_text(named_values(self.spec, row).get("label"))
        return self.labels[self._index[label]] if label in self._index else None

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        pairs = [(p.index, p.gold_index) for p in predictions]
        predicted = np.array([-1 if index is None else index for index, _ in pairs])
        gold = np.array([-1 if index is None else index for _, index in pairs])
        return [self._statistic(metric, predicted, gold) for metric in self.metrics]

    def _statistic(self, metric: str, predicted: np.ndarray, gold: np.ndarray) -> Statistic:
        if metric in ("accuracy", "macro_f1", "balanced_accuracy"):
            return ConfusionStatistic(metric, predicted, gold, len(self.labels))
        if metric == "f1":
            return ConfusionStatistic("f1", predicted, gold, len(self.labels), positive=len(self.labels) - 1)
        if metric in ("qwk", "kappa", "exact_agreement", "adjacent_agreement", "absolute_smd"):
            scores = np.array([int(name) for name in self.labels]) if self.spec.kind == "scoring" else None
            scale = scores if scores is not None else np.arange(len(self.labels))
            low, high = int(scale.min()), int(scale.max())
            return AgreementStatistic(metric, scale[predicted], scale[gold], low=low, high=high)  # type: ignore[arg-type]
        known = ("accuracy", "macro_f1", "balanced_accuracy", "f1", "qwk", "exact_agreement", "adjacent_agreement")
        raise DataError(
            f"`task.metric` must be one of {', '.join(known)}. Received {metric!r}.{did_you_mean(metric, known)}"
        )

    def _gold(self, values: Mapping[str, object], source: str) -> int | None:
        label = label_text(values.get("label"))
        if label is None:
            return None
        if label not in self._index:
            raise DataError(
                f"{source}: the label must be one of {listed(sorted(self._index))}. Received {label!r}."
                f"{did_you_mean(label, self._index)}"
            )
        return self._index[label]


def find_labels(
    spec: TaskSpec, rows: Sequence[Row], given: Mapping[str, str] | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """(names in order, value in the file -> name): from the recipe, the preset, or the rows.

    Values seen in the rows are sorted (as numbers if all are); underscores are shown as spaces. A row may also carry
    the name instead of the value. Raises DataError when fewer than two labels are found.
    """
    mapping = dict(given or spec.labels or {})
    if not mapping:
        seen = {label_text(named_values(spec, part).get("label")) for row in rows for part in unrolled(spec, row)}
        values = [value for value in seen if value is not None]
        if len(values) < 2:
            column = next(iter(spec.fields.get("label", ("label",))))
            there = listed(sorted(rows[0].values)) if rows else "no rows"
            raise DataError(
                f"Training rows must carry at least two labels in the field `label`. Received {len(values)}; the rows "
                f"have {there}. Try --label-field with the column's name (looked for `{column}`)."
            )
        mapping = {value: value.replace("_", " ") for value in sorted(values, key=_order(values))}
    if spec.kind == "scoring":
        wrong = [name for name in mapping.values() if not _is_integer(name)]
        if wrong:
            raise DataError(
                f"Scores must be whole numbers. Received {wrong[0]!r}. Try --task classification for names."
            )
        whole = range(min(int(n) for n in mapping.values()), max(int(n) for n in mapping.values()) + 1)
        mapping = {str(n): str(n) for n in whole} | mapping  # a score that no training row has still has a place
    names = tuple(dict.fromkeys(mapping.values()))
    if spec.kind == "scoring":
        names = tuple(sorted(names, key=int))
    return names, {name: name for name in names} | mapping


def _order(values: Sequence[str]):  # noqa: ANN202 - a sort key
    numeric = all(_is_number(value) for value in values)
    return (lambda value: (float(value), value)) if numeric else (lambda value: (0.0, value))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_integer(text: str) -> bool:
    return text.lstrip("+-").isdigit()
