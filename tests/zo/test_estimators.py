"""Losses on two sides to slopes."""

from __future__ import annotations

import numpy as np
import pytest

from tunefork.zo.estimators import ESTIMATORS, ONE_SIDED, TWO_SIDED
from tunefork.zo.probes import deal


def test_two_sided_slopes_are_exact_for_quadratics() -> None:
    loss = lambda t: 3 * t * t - 2 * t + 7  # noqa: E731
    first, second = np.array([loss(0.1)]), np.array([loss(-0.1)])
    assert TWO_SIDED.slopes(first, second, 0.1) == pytest.approx([-2.0])
    assert ONE_SIDED.slopes(first, np.array([loss(0.0)]), 0.1) == pytest.approx([-2.0 + 3 * 0.1])


def test_small_differences_of_large_losses_survive() -> None:
    first, second = np.array([1e4 + 1e-6]), np.array([1e4])
    assert TWO_SIDED.slopes(first, second, 1e-3) == pytest.approx([5e-4], rel=1e-3)
    assert TWO_SIDED.slopes(first, second, 1e-3).dtype == np.float32


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_every_row_is_dealt_once(rows: int, queries: int) -> None:
    dealt = deal(rows, queries, split=True)
    assert [i for start, stop in dealt for i in range(start, stop)] == list(range(rows))
    sizes = [stop - start for start, stop in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert deal(rows, queries, split=False) == [(0, rows)] * queries


def test_names() -> None:
    assert {name: e.signs for name, e in ESTIMATORS.items()} == {"two_sided": (1, -1), "one_sided": (1, 0)}
