"""Predictions as figures: metrics with intervals, the paired difference of two systems, rows gained and lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from tunefork.data.values import counted
from tunefork.errors import DataError
from tunefork.evaluate.harness import LOSS
from tunefork.metrics import Paired, bootstrap_interval, paired_difference
from tunefork.recipe.schema import EvaluateSection
from tunefork.tasks.base import Prediction, Statistic, Task


class Value(TypedDict):
    """A metric as result.json holds it."""

    value: float
    low: float
    high: float
    n: int


_RIGHT_AT_ONE = {"macro_f1", "balanced_accuracy", "qwk", "kappa"}  # shares have an exact interval, with width


@dataclass(frozen=True, slots=True)
class Change:
    """A row on which two systems differ, by the choosing metric on that row alone."""

    source: str
    gold: str | None
    before: str
    after: str
    difference: float  # after - before, positive where `after` is better


def measure(task: Task, predictions: Sequence[Prediction], section: EvaluateSection, seed: int) -> dict[str, Value]:
    """The task's metrics, the choosing one first, each with a bootstrap interval over rows (or groups of rows).

    Rows without a right answer are left out, and of the loss also rows whose loss is not known (an answer that does
    not fit the model): `n` tells how many remain. A metric without rows is absent. The same seed resamples the same
    rows, whatever was predicted.
    """
    found: dict[str, Value] = {}
    for rows, (statistic,) in _statistics(task, predictions):
        interval = bootstrap_interval(
            statistic,
            len(rows),
            groups=[predictions[i].group for i in rows],
            resamples=section.bootstrap,
            confidence=section.confidence,
            seed=seed,
        )
        found[statistic.name] = Value(value=interval.value, low=interval.low, high=interval.high, n=interval.n)
    return found


def caution(figures: Mapping[str, Mapping[str, Any]], named: Callable[[str], str] = str) -> str:
    """What must be said of metrics whose interval has no width; empty where there are none."""
    flat = {metric: f for metric, f in figures.items() if f["low"] is not None and f["low"] == f["high"]}
    if not flat:
        return ""
    n = max(int(f["n"]) for f in flat.values())
    names = ", ".join(named(metric) for metric in flat)
    text = f"{names}: no spread over resamples of {counted(n, 'row')}, which does not make it exact."
    if any(f["value"] == 1 and metric in _RIGHT_AT_ONE for metric, f in flat.items()):
        share = f"{100 * min(1.0, 3 / n):.0f} %"
        text += f" All are right; up to about {share} of new ones may be wrong (rule of three, for independent rows)."
    return text


def compare_predictions(
    task: Task, a: Sequence[Prediction], b: Sequence[Prediction], section: EvaluateSection, seed: int
) -> dict[str, Paired]:
    """For each metric both have, the difference a - b with its interval and p-value, on the same resampled rows.

    Raises DataError when a and b are not about the same rows in the same order.
    """
    _same_rows(a, b)
    return {
        one.name: paired_difference(
            one,
            other,
            len(rows),
            groups=[a[i].group for i in rows],
            resamples=section.bootstrap,
            confidence=section.confidence,
            seed=seed,
        )
        for rows, (one, other) in _statistics(task, a, b)
    }


def gained_lost(
    task: Task, before: Sequence[Prediction], after: Sequence[Prediction]
) -> tuple[list[Change], list[Change]]:
    """Rows that `after` answers better than `before`, and rows it answers worse, largest difference first.

    Where rows have a right candidate, better means right against wrong; elsewhere the choosing metric on that row.
    Raises DataError when the two are not about the same rows in the same order.
    """
    _same_rows(before, after)
    changes = [
        Change(before[i].source, before[i].gold, before[i].predicted, after[i].predicted, difference)
        for i, difference in _differences(task, before, after)
    ]
    gained = sorted((c for c in changes if c.difference > 0), key=lambda c: -c.difference)
    lost = sorted((c for c in changes if c.difference < 0), key=lambda c: c.difference)
    return gained, lost


def _differences(task: Task, before: Sequence[Prediction], after: Sequence[Prediction]) -> list[tuple[int, float]]:
    """(row, how much better `after` is on it) for the rows with a known answer."""
    rows = [i for i, p in enumerate(before) if p.gold_index is not None or p.golds]
    if rows:
        return [(i, float(_is_right(after[i])) - float(_is_right(before[i]))) for i in rows]
    for rows, (first, second) in _statistics(task, before, after):
        sign = 1.0 if first.higher_is_better else -1.0
        return [(i, sign * (second(np.array([k])) - first(np.array([k])))) for k, i in enumerate(rows)]
    return []


def _is_right(prediction: Prediction) -> bool:
    return prediction.index in (prediction.golds or (prediction.gold_index,))


def _statistics(task: Task, *systems: Sequence[Prediction]) -> list[tuple[list[int], list[Statistic]]]:
    """For each metric that every system has: the rows it is over, and each system's statistic."""
    answered = [i for i, row in enumerate(zip(*systems, strict=True)) if all(map(_answered, row))]
    with_loss = [i for i in answered if all(system[i].loss is not None for system in systems)]
    named = _named(task, systems, answered)
    of_loss = named if with_loss == answered else _named(task, systems, with_loss)
    found: list[tuple[list[int], list[Statistic]]] = []
    for name in task.metrics:
        rows, tables = (with_loss, of_loss) if name == LOSS else (answered, named)
        if rows and all(name in table for table in tables):
            found.append((rows, [table[name] for table in tables]))
    return found


def _named(task: Task, systems: Sequence[Sequence[Prediction]], rows: Sequence[int]) -> list[dict[str, Statistic]]:
    """Each system's statistics over these rows, by name."""
    if not rows:
        return [{} for _ in systems]
    return [{s.name: s for s in task.statistics([system[i] for i in rows])} for system in systems]


def _answered(prediction: Prediction) -> bool:
    """Whether the right answer is known."""
    candidate = prediction.gold_index is not None or bool(prediction.golds)
    return candidate or bool(prediction.references) or prediction.loss is not None


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
