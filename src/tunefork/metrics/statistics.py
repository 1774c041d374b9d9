"""Metrics that can be recomputed on any resample of their rows, in O(rows) without checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tunefork.errors import DataError, did_you_mean
from tunefork.metrics import agreement, classification
from tunefork.metrics.arrays import Ints, integer_pair

Rows = NDArray[np.int64]
ConfusionMetric = Literal["accuracy", "macro_f1", "balanced_accuracy", "f1"]
AgreementMetric = Literal["qwk", "kappa", "exact_agreement", "adjacent_agreement", "absolute_smd"]


class Statistic(Protocol):
    """A metric that can be recomputed on any resample of its rows."""

    name: str
    higher_is_better: bool

    def __call__(self, rows: np.ndarray) -> float:
        """Value on the rows with these indices (repeats allowed)."""
        ...


class PairableStatistic(ABC):
    """A statistic whose rows can be exchanged, one by one, with those of the same metric for another system."""

    name: str
    higher_is_better: bool

    @abstractmethod
    def __call__(self, rows: np.ndarray) -> float:
        """Value on the rows with these indices (repeats allowed)."""

    @abstractmethod
    def __len__(self) -> int:
        """How many rows it holds."""

    @property
    @abstractmethod
    def is_share(self) -> bool:
        """Whether it is the share of rows of which something holds."""

    @abstractmethod
    def joined(self, other: PairableStatistic) -> PairableStatistic:
        """One statistic over this one's rows followed by the other's (row i of `other` is row len(self) + i).

        Raises DataError unless both are the same metric about the same rows.
        """

    def _unlike(self, other: PairableStatistic, why: str) -> DataError:
        return DataError(
            f"Two systems are compared by one metric on the same rows in the same order. Received `{self.name}` and "
            f"`{other.name}`: {why}. Try predictions of both on the same file."
        )


class MeanStatistic(PairableStatistic):
    """Mean of one finite number a row (exact match, ROUGE, loss …); `values` has shape [n]."""

    def __init__(self, name: str, values: ArrayLike, *, higher_is_better: bool = True) -> None:
        self.name = name
        self.higher_is_better = higher_is_better
        self.values = np.asarray(values, dtype=np.float64)
        if self.values.ndim != 1 or not self.values.size:
            raise DataError(
                f"`{name}` must have one value a row and at least one row. Received shape {self.values.shape}. "
                "Try a split that has rows."
            )
        bad = np.flatnonzero(~np.isfinite(self.values))
        if bad.size:
            raise DataError(
                f"`{name}` must be finite in every row. Received {self.values[bad[0]]} in row {bad[0]} "
                f"({bad.size} such rows). Try looking at what the model gave for it."
            )

    def __call__(self, rows: np.ndarray) -> float:
        return float(self.values[rows].mean())

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_share(self) -> bool:
        return self.higher_is_better and bool(np.isin(self.values, (0, 1)).all())

    def joined(self, other: PairableStatistic) -> MeanStatistic:
        if not isinstance(other, MeanStatistic) or other.name != self.name:
            raise self._unlike(other, "different metrics")
        values = np.concatenate([self.values, other.values])
        return MeanStatistic(self.name, values, higher_is_better=self.higher_is_better)


class ConfusionStatistic(PairableStatistic):
    """A metric of class indices [n]: accuracy, macro_f1, balanced_accuracy, or f1 of the one class `positive`.

    Raises DataError for indices outside 0..n_classes-1: a row without a valid prediction needs a class of its own.
    """

    def __init__(
        self, metric: ConfusionMetric, predicted: ArrayLike, gold: ArrayLike, n_classes: int, *, positive: int = 1
    ) -> None:
        _check_metric(metric, get_args(ConfusionMetric))
        if metric == "f1" and not 0 <= positive < n_classes:
            raise DataError(
                f"`positive` must lie in 0..{n_classes - 1}. Received {positive}. Try the index of a class."
            )
        self.name: str = metric
        self.higher_is_better: bool = True
        self.metric: ConfusionMetric = metric
        self.n_classes = n_classes
        self.positive = positive
        self.predicted, self.gold = integer_pair(predicted, gold, 0, n_classes - 1)

    def __call__(self, rows: np.ndarray) -> float:
        counts = classification.class_counts(self.predicted[rows], self.gold[rows], self.n_classes)
        match self.metric:
            case "accuracy":
                return counts.accuracy()
            case "macro_f1":
                return counts.macro_f1()
            case "balanced_accuracy":
                return counts.balanced_accuracy()
            case "f1":
                return counts.micro_f1([self.positive])

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def is_share(self) -> bool:
        return self.metric == "accuracy"

    def joined(self, other: PairableStatistic) -> ConfusionStatistic:
        same = isinstance(other, ConfusionStatistic) and (self.metric, self.n_classes, self.positive) == (
            other.metric,
            other.n_classes,
            other.positive,
        )
        if not isinstance(other, ConfusionStatistic) or not same:
            raise self._unlike(other, "different metrics or classes")
        if not np.array_equal(self.gold, other.gold):
            raise self._unlike(other, "different gold labels")
        predicted, gold = np.concatenate([self.predicted, other.predicted]), np.concatenate([self.gold, other.gold])
        return ConfusionStatistic(self.metric, predicted, gold, self.n_classes, positive=self.positive)


class AgreementStatistic(PairableStatistic):
    """A metric of integer scores [n] on the scale low..high. `absolute_smd` is |SMD|, where lower is better."""

    def __init__(self, metric: AgreementMetric, predicted: ArrayLike, gold: ArrayLike, *, low: int, high: int) -> None:
        _check_metric(metric, get_args(AgreementMetric))
        self.name: str = metric
        self.higher_is_better: bool = metric != "absolute_smd"
        self.metric: AgreementMetric = metric
        self.low, self.high = low, high
        self.predicted, self.gold = integer_pair(predicted, gold, low, high)

    def __call__(self, rows: np.ndarray) -> float:
        return _AGREEMENT[self.metric](self.predicted[rows], self.gold[rows])

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def is_share(self) -> bool:
        return self.metric in ("exact_agreement", "adjacent_agreement")

    def joined(self, other: PairableStatistic) -> AgreementStatistic:
        if not isinstance(other, AgreementStatistic) or other.metric != self.metric:
            raise self._unlike(other, "different metrics")
        if not np.array_equal(self.gold, other.gold):
            raise self._unlike(other, "different gold scores")
        predicted, gold = np.concatenate([self.predicted, other.predicted]), np.concatenate([self.gold, other.gold])
        low, high = min(self.low, other.low), max(self.high, other.high)
        return AgreementStatistic(self.metric, predicted, gold, low=low, high=high)


_AGREEMENT: Mapping[AgreementMetric, Callable[[Ints, Ints], float]] = {
    "qwk": agreement.quadratic_weighted_kappa,
    "kappa": agreement.cohen_kappa,
    "exact_agreement": lambda predicted, gold: agreement.agreement_within(predicted, gold, 0),
    "adjacent_agreement": lambda predicted, gold: agreement.agreement_within(predicted, gold, 1),
    "absolute_smd": lambda predicted, gold: abs(agreement.mean_difference(predicted, gold)),
}


def _check_metric(metric: str, known: tuple[str, ...]) -> None:
    if metric not in known:
        raise DataError(
            f"`metric` must be one of {', '.join(known)}. Received {metric!r}.{did_you_mean(metric, known)}"
        )
