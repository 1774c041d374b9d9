"""Checks shared by this room: two integer arrays about the same rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tunefork.errors import DataError

Ints = NDArray[np.int64]


def integer_pair(
    predicted: ArrayLike, gold: ArrayLike, low: int | None = None, high: int | None = None
) -> tuple[Ints, Ints]:
    """Both as int64 arrays [n], n >= 1, with every value in low..high where those are given.

    Raises DataError for no rows, unequal lengths, values that are not integers, or values out of range.
    """
    if low is not None and high is not None and high < low:
        raise DataError(
            f"The highest value must not be below the lowest. Received {low}..{high}. Try naming them in order."
        )
    pair = _integers(predicted, "predicted", low, high), _integers(gold, "gold", low, high)
    if len(pair[0]) != len(pair[1]):
        raise DataError(
            "`predicted` and `gold` must be about the same rows. "
            f"Received {len(pair[0])} and {len(pair[1])} values. Try one prediction a row."
        )
    return pair


def _integers(values: ArrayLike, name: str, low: int | None, high: int | None) -> Ints:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise DataError(
            f"`{name}` must be a list of at least one integer. Received an array of shape {array.shape}. "
            "Try a split that has rows."
        )
    if array.dtype.kind not in "iub":
        raise DataError(f"`{name}` must hold integers. Received {array.dtype}. Try class indices, or rounded scores.")
    array = array.astype(np.int64)
    below = low is not None and array.min() < low
    above = high is not None and array.max() > high
    if below or above:
        raise DataError(
            f"`{name}` must lie in {'' if low is None else low}..{'' if high is None else high}. "
            f"Received {array.min() if below else array.max()}. Try giving such rows a class of their own."
        )
    return array
