"""Agreement on ordinal scores: equal to scikit-learn's kappas, exact invariants, defined without variance."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from tunefork.errors import DataError
from tunefork.metrics import adjacent_agreement, exact_agreement, kappa, qwk, standardised_mean_difference

LOW, HIGH = -1, 6
score = st.integers(LOW, HIGH)
rows = st.lists(st.tuples(score, score), min_size=1, max_size=60)


def split(pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


@settings(deadline=None)
@given(rows)
def test_kappas_equal_sklearn(pairs: list[tuple[int, int]]) -> None:
    predicted, gold = split(pairs)
    ours = qwk(predicted, gold, low=LOW, high=HIGH), kappa(predicted, gold)
    if len({*predicted, *gold}) == 1:
        assert ours == (0.0, 0.0)  # scikit-learn: nan and a warning
        return
    labels = list(range(LOW, HIGH + 1))
    assert ours[0] == pytest.approx(cohen_kappa_score(predicted, gold, weights="quadratic", labels=labels), abs=1e-12)
    assert ours[1] == pytest.approx(cohen_kappa_score(predicted, gold), abs=1e-12)


@settings(deadline=None)
@given(rows)
def test_qwk_equals_its_moment_form(pairs: list[tuple[int, int]]) -> None:
    predicted, gold = np.array(split(pairs), dtype=float)
    spread = predicted.var() + gold.var() + (predicted.mean() - gold.mean()) ** 2
    expected = 2 * np.mean((predicted - predicted.mean()) * (gold - gold.mean())) / spread if spread else 0.0
    assert qwk(predicted.astype(int), gold.astype(int), low=LOW, high=HIGH) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_symmetric_and_blind_to_order(pairs: list[tuple[int, int]], shuffler: random.Random) -> None:
    predicted, gold = split(pairs)
    value = qwk(predicted, gold, low=LOW, high=HIGH)
    assert qwk(gold, predicted, low=LOW, high=HIGH) == value
    shuffler.shuffle(pairs)
    assert qwk(*split(pairs), low=LOW, high=HIGH) == value
    assert -1 <= value <= 1


@settings(deadline=None)
@given(st.lists(score, min_size=2, max_size=60).filter(lambda scores: len(set(scores)) > 1))
def test_perfect_agreement(scores: list[int]) -> None:
    assert qwk(scores, scores, low=LOW, high=HIGH) == 1
    assert kappa(scores, scores) == 1
    assert exact_agreement(scores, scores) == adjacent_agreement(scores, scores) == 1
    assert standardised_mean_difference(scores, scores) == 0


@settings(deadline=None)
@given(st.lists(score, min_size=1, max_size=60), score)
def test_a_constant_scorer_gets_nothing(gold: list[int], constant: int) -> None:
    predicted = [constant] * len(gold)
    assert qwk(predicted, gold, low=LOW, high=HIGH) == 0
    assert kappa(predicted, gold) == 0


@settings(deadline=None)
@given(rows)
def test_agreement_shares(pairs: list[tuple[int, int]]) -> None:
    predicted, gold = split(pairs)
    assert exact_agreement(predicted, gold) == pytest.approx(sum(p == g for p, g in pairs) / len(pairs))
    assert adjacent_agreement(predicted, gold) == pytest.approx(sum(abs(p - g) <= 1 for p, g in pairs) / len(pairs))


def test_mean_difference_is_standardised_by_the_sample_deviation_of_gold() -> None:
    assert standardised_mean_difference([2, 3, 4, 3], [0, 1, 2, 1]) == pytest.approx(2 / np.std([0, 1, 2, 1], ddof=1))
    assert standardised_mean_difference([0, 0], [0, 2]) < 0


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [([1, 1], [1, 1], 0.0), ([2, 1], [1, 1], math.inf), ([0, 1], [1, 1], -math.inf), ([3], [1], math.inf)],
)
def test_mean_difference_without_variance(predicted: list[int], gold: list[int], expected: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert standardised_mean_difference(predicted, gold) == expected


def test_one_row_is_defined_and_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert qwk([1], [2], low=0, high=3) == 0
        assert kappa([1], [1]) == 0
        assert (exact_agreement([1], [2]), adjacent_agreement([1], [2])) == (0, 1)


def test_refused() -> None:
    with pytest.raises(DataError, match=r"0\.\.3.*Received 4"):
        qwk([0, 4], [0, 1], low=0, high=3)
    with pytest.raises(DataError, match=r"Received 3\.\.0"):
        qwk([0], [0], low=3, high=0)
    with pytest.raises(DataError, match="integers"):
        qwk([0.5], [0], low=0, high=3)
    with pytest.raises(DataError, match="at least one"):
        standardised_mean_difference([], [])
