"""Predictions as figures: metrics with intervals, the paired difference of two systems, rows gained and lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict

import numpy as np

from tunefork.errors import DataError
from tunefork.metrics import Paired, bootstrap_interval, paired_difference
from tunefork.recipe.schema import EvaluateSection
from tunefork.tasks.base import Prediction, Statistic, Task


class Value(TypedDict):
    """A metric as result.json holds it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Change:
    """A row on which two systems differ, by the choosing metric on that row alone."""

    source: str
    gold: str | None
    before: str
    after: str
    difference: float  # after - before, positive where `after` is better


def measure(
    task: Task, predictions: Sequence[Prediction], section: EvaluateSection, seed: int
) -> dict[str, Value]:
    """The task's metrics, the choosing one first, each with a bootstrap interval over rows (or groups of rows).

    Empty without predictions. The same seed resamples the same rows, whatever was predicted.
    """
    if not predictions:
        return {}
    groups = [p.group for p in predictions]
    found: dict[str, Value] = {}
    for statistic in task.statistics(predictions):
        interval = bootstrap_interval(
            statistic,
            len(predictions),
            groups=groups,
            resamples=section.bootstrap,
            confidence=section.confidence,
            seed=seed,
        )
        found[statistic.name] = Value(value=interval.value, low=interval.low, high=interval.high, n=interval.n)
    return found


def compare_predictions(
    task: Task, a: Sequence[Prediction], b: Sequence[Prediction], section: EvaluateSection, seed: int
) -> dict[str, Paired]:
    """For each metric the difference a - b with its interval and p-value, both systems on the same resampled rows.

    Raises DataError when a and b are not about the same rows in the same order.
    """
    _same_rows(a, b)
    if not a:
        return {}
    groups = [p.group for p in a]
    return {
        one.name: paired_difference(
            one, other, len(a), groups=groups, resamples=section.bootstrap, confidence=section.confidence, seed=seed
        )
        for one, other in zip(task.statistics(a), task.statistics(b), strict=True)
    }


def gained_lost(task: Task, before: Sequence[Prediction], after: Sequence[Prediction]) -> tuple[list[Change], list[Change]]:
    """Rows that `after` answers better than `before`, and rows it answers worse, largest difference first.

    Where a row has a right candidate, better means right against wrong; elsewhere the choosing metric on that row.
    """
    _same_rows(before, after)
    scores_before, scores_after = _row_scores(task, before), _row_scores(task, after)
    changes = [
        Change(p.source, p.gold, p.predicted, q.predicted, float(y - x))
        for p, q, x, y in zip(before, after, scores_before, scores_after, strict=True)
    ]
    gained = sorted((c for c in changes if c.difference > 0), key=lambda c: -c.difference)
    lost = sorted((c for c in changes if c.difference < 0), key=lambda c: c.difference)
    return gained, lost


def _row_scores(task: Task, predictions: Sequence[Prediction]) -> list[float]:
    """How good each answer is, higher is better."""
    if all(p.gold_index is not None or p.golds for p in predictions):
        return [float(p.index in (p.golds or (p.gold_index,))) for p in predictions]
    choosing: Statistic = task.statistics(predictions)[0]
    sign = 1.0 if choosing.higher_is_better else -1.0
    return [sign * choosing(np.array([i])) for i in range(len(predictions))]


def _same_rows(a: Sequence[Prediction], b: Sequence[Prediction]) -> None:
    if len(a) != len(b):
        raise DataError(
            f"Two systems are compared on the same rows. Received {len(a)} and {len(b)} predictions. "
            "Try measuring both on one file."
        )
    for place, (p, q) in enumerate(zip(a, b, strict=True)):
        if p.source != q.source or p.gold != q.gold:
            raise DataError(
                f"Two systems are compared on the same rows in the same order. Received {p.source} (gold {p.gold!r}) "
                f"and {q.source} (gold {q.gold!r}) in place {place}. Try measuring both on one file."
            )
