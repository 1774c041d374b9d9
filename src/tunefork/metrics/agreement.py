"""Agreement of two raters on ordinal integer scores: the standards of automatic scoring.

Thresholds commonly asked of a scoring engine (Williamson, Xi & Breyer 2012, EM:IP 31(1), 2-13): QWK at least 0.70, at
most 0.10 below human-human QWK, and |SMD| at most 0.15.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from tunefork.metrics.arrays import Ints, integer_pair


def qwk(predicted: ArrayLike, gold: ArrayLike, *, low: int, high: int) -> float:
    """Quadratic weighted kappa (Cohen 1968) of integer scores [n] on the scale low..high; symmetric, at most 1.

    Two raters who always give one and the same score get 0.0: without variance nothing is known beyond chance, and a
    scorer that never changes its mind gets 0.0 against any other gold as well.
    Raises DataError for no rows or scores off the scale.
    """
    return quadratic_weighted_kappa(*integer_pair(predicted, gold, low, high))


def kappa(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Cohen's unweighted kappa (1960); 0.0 when both raters always give one and the same score, as in `qwk`."""
    return cohen_kappa(*integer_pair(predicted, gold))


def exact_agreement(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Share of rows with equal scores, 0..1."""
    return agreement_within(*integer_pair(predicted, gold), 0)


def adjacent_agreement(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Share of rows whose scores differ by at most one point, 0..1 (exact agreement is included)."""
    return agreement_within(*integer_pair(predicted, gold), 1)


def standardised_mean_difference(predicted: ArrayLike, gold: ArrayLike) -> float:
    """(mean predicted - mean gold) / sample standard deviation of gold (ddof 1); positive means too generous.

    This is the unpooled form RSMTool reports by default. Where gold does not vary (or n is 1) it is 0.0 for equal means
    and otherwise infinite with the sign of the difference, so that a threshold on it fails.
    """
    return mean_difference(*integer_pair(predicted, gold))


# The same on arrays known to be good: what each resample calls.


def quadratic_weighted_kappa(predicted: Ints, gold: Ints) -> float:
    # With quadratic weights the matrix form reduces to moments (the scale's length cancels). They are summed as
    # integers from a common zero, so symmetry, order of rows and perfect agreement are exact.
    zero = min(predicted.min(), gold.min())
    p, g = predicted - zero, gold - zero
    n, d = len(p), p - g
    observed = n * int(d @ d)
    expected = n * (int(p @ p) + int(g @ g)) - 2 * int(p.sum()) * int(g.sum())
    return 1 - observed / expected if expected else 0.0


def cohen_kappa(predicted: Ints, gold: Ints) -> float:
    zero = min(predicted.min(), gold.min())
    size = int(max(predicted.max(), gold.max()) - zero) + 1
    n = len(gold)
    agreed = n * int(np.count_nonzero(predicted == gold))
    chance = int(np.bincount(predicted - zero, minlength=size) @ np.bincount(gold - zero, minlength=size))
    return (agreed - chance) / (n * n - chance) if n * n > chance else 0.0


def agreement_within(predicted: Ints, gold: Ints, tolerance: int) -> float:
    return float(np.mean(np.abs(predicted - gold) <= tolerance))


def mean_difference(predicted: Ints, gold: Ints) -> float:
    difference = float(np.mean(predicted - gold))
    if gold.min() == gold.max():
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / float(np.std(gold, ddof=1))
