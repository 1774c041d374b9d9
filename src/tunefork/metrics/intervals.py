"""How sure a figure is: bootstrap intervals, and tests of the difference of two systems on the same rows.

Every random draw comes from a generator of its own, seeded by the caller; the same seed gives the same resamples
whatever the statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunefork.errors import DataError
from tunefork.metrics.statistics import PairableStatistic, Rows, Statistic


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its confidence interval, from n rows."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Paired:
    """The difference a - b with its confidence interval and the p-value of "there is none", from n rows."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    clear: bool  # the interval leaves out zero, and p <= 1 - confidence: with few rows one may hold without the other


class _Units:
    """What is drawn or swapped as a whole: rows, or groups of rows. An empty group name is a group of one row."""

    def __init__(self, n: int, groups: Sequence[str] | None) -> None:
        if n < 1:
            raise DataError(f"An interval needs at least one row. Received {n}. Try a split that has rows.")
        if groups is not None and len(groups) != n:
            raise DataError(
                f"`groups` must name one group a row. Received {len(groups)} for {n} rows. Try '' for rows without one."
            )
        self.n = n
        self.grouped = groups is not None and any(groups)
        self.unit_of_row: Rows = np.arange(n)
        if groups is not None and self.grouped:
            numbers: dict[str | int, int] = {}
            keys = [group or row for row, group in enumerate(groups)]
            self.unit_of_row = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
        self.sizes = np.bincount(self.unit_of_row)
        self.count = len(self.sizes)
        self._rows = np.argsort(self.unit_of_row, kind="stable")
        self._starts = np.cumsum(self.sizes) - self.sizes

    def draw(self, generator: np.random.Generator) -> Rows:
        """Rows of as many units as there are, drawn with replacement (so their number varies with uneven groups)."""
        units = generator.integers(self.count, size=self.count)
        if not self.grouped:
            return units
        sizes = self.sizes[units]
        ends = np.cumsum(sizes)
        within = np.arange(int(ends[-1])) - np.repeat(ends - sizes, sizes)
        return self._rows[np.repeat(self._starts[units], sizes) + within]

    def flip(self, generator: np.random.Generator) -> NDArray[np.bool_]:
        """A fair coin a unit, spread over its rows: [n]."""
        return (generator.integers(2, size=self.count) == 1)[self.unit_of_row]


def _generator(seed: int, resamples: int, confidence: float) -> np.random.Generator:
    if resamples < 1:
        raise DataError(f"`resamples` must be at least 1. Received {resamples}. Try 2000.")
    if not 0 < confidence < 1:
        raise DataError(f"`confidence` must be in (0, 1). Received {confidence}. Try 0.95.")
    return np.random.Generator(np.random.PCG64(seed))


def _percentiles(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    # inverted_cdf does not interpolate, so an infinite resample (SMD without variance) cannot turn the ends into NaN
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def bootstrap_interval(
    statistic: Statistic,
    n: int,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13) of a statistic over rows 0..n-1.

    `groups` names each row's group; whole groups are resampled, since rows of one group are not independent (the
    cluster bootstrap, Davison & Hinkley 1997, 3.8); rows named "" stand for themselves.

    The bootstrap knows only the spread it sees. Where all rows agree (accuracy 1), a share has the exact interval of as
    many trials as there are rows (or groups) instead (Clopper & Pearson 1934). For every other statistic low and high
    then equal the value, as with a single row, which says nothing about the next row; read n beside it. Statistics that
    are biased in small samples (macro-F1, QWK) may lie off the middle of their interval, seldom outside it.
    Raises DataError for n = 0.
    """
    generator = _generator(seed, resamples, confidence)
    units = _Units(n, groups)
    value = statistic(np.arange(n))
    if value in (0, 1) and isinstance(statistic, PairableStatistic) and statistic.is_share:
        nearest = ((1 - confidence) / 2) ** (1 / units.count)
        return Interval(value, *((nearest, 1.0) if value else (0.0, 1 - nearest)), n)
    values = np.array([statistic(units.draw(generator)) for _ in range(resamples)])
    return Interval(value, *_percentiles(values, confidence), n)


def paired_difference(
    a: Statistic,
    b: Statistic,
    n: int,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Paired:
    """The difference a - b of one metric for two systems on the same rows, signed whichever way the metric is better.

    The interval is the percentile bootstrap of the difference, both systems on the same resampled rows. The p-value is
    two-sided approximate randomisation (Noreen 1989; Yeh 2000, COLING): each row's, or group's, outputs of the two
    systems are swapped by a fair coin and the metric is computed anew. That is the sign-flip test where the metric is a
    mean, and stays right where it is not (F1, QWK), at any n, while a bootstrap p-value is too small when rows are few.
    p = (1 + as extreme) / (1 + resamples), never 0 (Phipson & Smyth 2010). The null is that the two systems are
    interchangeable. With one row or one group p is 1.

    Raises DataError when the two are not the same metric about the same n rows, or are not from this room.
    """
    generator = _generator(seed, resamples, confidence)
    units = _Units(n, groups)
    if not isinstance(a, PairableStatistic) or not isinstance(b, PairableStatistic):
        raise DataError(
            "Systems can be compared by a mean, confusion or agreement statistic. "
            f"Received `{a.name}` and `{b.name}`. Try a subclass of PairableStatistic."
        )
    if len(a) != n or len(b) != n:
        raise DataError(
            f"Both systems must have a prediction for each of the {n} rows. Received {len(a)} and {len(b)}. "
            "Try predictions of both on the same file."
        )
    both = a.joined(b)
    differences = np.empty(resamples)
    for index in range(resamples):
        rows = units.draw(generator)
        differences[index] = _minus(a(rows), b(rows))
    everything = np.arange(n)
    difference = _minus(a(everything), b(everything))
    extreme = 0
    for _ in range(resamples):
        moved = units.flip(generator) * n
        swapped = _minus(both(everything + moved), both(everything + n - moved))
        extreme += abs(swapped) >= abs(difference) - 1e-12  # sums in another order may differ in the last bits
    p_value = (1 + extreme) / (1 + resamples)
    low, high = _percentiles(differences, confidence)
    return Paired(difference, low, high, p_value, n, not low <= 0 <= high and p_value <= 1 - confidence)


def _minus(a: float, b: float) -> float:
    return 0.0 if a == b else a - b  # inf - inf is no difference
