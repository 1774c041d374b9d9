"""Intervals and tests of differences: invariants, coverage and size by simulation, degenerate cases."""

from __future__ import annotations

import itertools
import math
import random
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefork import metrics
from tunefork.errors import DataError
from tunefork.metrics import (
    AgreementStatistic,
    ConfusionStatistic,
    MeanStatistic,
    PairableStatistic,
    bootstrap_interval,
    paired_difference,
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def scores(n: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and gold scores 0..3; a share `noise` of the predictions is random."""
    draw = generator(seed)
    gold = draw.integers(4, size=n)
    return np.where(draw.random(n) < noise, draw.integers(4, size=n), gold), gold


def all_statistics(predicted: np.ndarray, gold: np.ndarray) -> list[PairableStatistic]:
    confusion = [ConfusionStatistic(m, predicted, gold, 4) for m in ("accuracy", "macro_f1", "balanced_accuracy", "f1")]
    agreement = [
        AgreementStatistic(m, predicted, gold, low=0, high=3)
        for m in ("qwk", "kappa", "exact_agreement", "adjacent_agreement", "absolute_smd")
    ]
    return [MeanStatistic("exact_match", predicted == gold), *confusion, *agreement]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=30))
def test_a_statistic_on_chosen_rows_is_the_metric_of_those_rows(rows: list[tuple[int, int, bool]]) -> None:
    predicted, gold = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    chosen = np.flatnonzero([row[2] for row in rows])
    if not chosen.size:
        chosen = np.array([0, 0])
    p, g = predicted[chosen], gold[chosen]
    expected = {
        "exact_match": metrics.accuracy(p, g),
        "accuracy": metrics.accuracy(p, g),
        "macro_f1": metrics.macro_f1(p, g),
        "balanced_accuracy": metrics.balanced_accuracy(p, g),
        "f1": metrics.micro_f1(p, g, [1]),
        "qwk": metrics.qwk(p, g, low=0, high=3),
        "kappa": metrics.kappa(p, g),
        "exact_agreement": metrics.exact_agreement(p, g),
        "adjacent_agreement": metrics.adjacent_agreement(p, g),
        "absolute_smd": abs(metrics.standardised_mean_difference(p, g)),
    }
    for statistic in all_statistics(predicted, gold):
        assert statistic(chosen) == pytest.approx(expected[statistic.name], abs=1e-12), statistic.name
        assert statistic.higher_is_better is (statistic.name != "absolute_smd")


def test_interval_holds_the_value_is_seeded_and_leaves_the_global_generator_alone() -> None:
    predicted, gold = scores(300, 0.4)
    np.random.seed(7)
    random.seed(7)
    untouched = np.random.random(), random.random()
    np.random.seed(7)
    random.seed(7)
    for statistic in all_statistics(predicted, gold):
        first = bootstrap_interval(statistic, 300, resamples=300, seed=3)
        assert first == bootstrap_interval(statistic, 300, resamples=300, seed=3)
        assert first.low <= first.value <= first.high and first.n == 300
        assert first.value == statistic(np.arange(300))
    assert (np.random.random(), random.random()) == untouched
    mean = MeanStatistic("x", generator().normal(size=300))
    assert bootstrap_interval(mean, 300, resamples=50, seed=1) != bootstrap_interval(mean, 300, resamples=50, seed=2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(-5, 5))
def test_interval_of_a_symmetric_sample_holds_its_mean_and_moves_with_it(seed: int, shift: float) -> None:
    half = generator(seed).normal(size=40)
    values = np.concatenate([half, -half])
    found = bootstrap_interval(MeanStatistic("x", values), 80, resamples=200, seed=seed)
    assert found.low < 0 < found.high
    moved = bootstrap_interval(MeanStatistic("x", values + shift), 80, resamples=200, seed=seed)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-9)


def test_interval_shrinks_with_rows_and_grows_with_confidence() -> None:
    values = generator().normal(size=6400)
    widths = []
    for n in (100, 400, 1600, 6400):
        found = bootstrap_interval(MeanStatistic("x", values[:n]), n, resamples=400)
        widths.append(found.high - found.low)
    for wide, narrow in itertools.pairwise(widths):
        assert 1.5 < wide / narrow < 2.7  # a quarter of the variance: half the width
    levels = [bootstrap_interval(MeanStatistic("x", values[:100]), 100, confidence=level) for level in (0.5, 0.9, 0.99)]
    assert levels[0].low > levels[1].low > levels[2].low and levels[0].high < levels[1].high < levels[2].high


def test_coverage_of_a_mean_is_near_nominal() -> None:
    draw, covered, trials = generator(11), 0, 300
    for trial in range(trials):
        values = draw.exponential(size=60)
        found = bootstrap_interval(MeanStatistic("x", values), 60, resamples=200, confidence=0.9, seed=trial)
        covered += found.low <= 1 <= found.high
    assert 0.83 < covered / trials < 0.95


def test_grouped_rows_are_drawn_together() -> None:
    values = np.repeat(generator(5).normal(size=40), 10)  # ten copies of each: 40 independent values, not 400
    groups = [f"g{row // 10}" for row in range(400)]
    rows = bootstrap_interval(MeanStatistic("x", values), 400)
    clusters = bootstrap_interval(MeanStatistic("x", values), 400, groups=groups)
    singles = bootstrap_interval(MeanStatistic("x", values[::10]), 40)
    assert clusters.high - clusters.low == pytest.approx(singles.high - singles.low, rel=1e-6)
    assert (clusters.high - clusters.low) / (rows.high - rows.low) == pytest.approx(math.sqrt(10), rel=0.15)

    seen: list[np.ndarray] = []

    class Watching(MeanStatistic):
        def __call__(self, rows: np.ndarray) -> float:
            seen.append(rows)
            return super().__call__(rows)

    uneven = ["b", "a", "b", "", "a", "b", ""]
    bootstrap_interval(Watching("x", np.arange(7.0)), 7, groups=uneven, resamples=50)
    for rows_drawn in seen:
        counts = np.bincount(rows_drawn, minlength=7)
        assert counts[0] == counts[2] == counts[5] and counts[1] == counts[4]
    assert any((counts := np.bincount(r, minlength=7))[3] != counts[6] for r in seen)  # "" is nobody's group


def test_groups_without_names_are_no_groups() -> None:
    statistic = MeanStatistic("x", generator().normal(size=30))
    assert bootstrap_interval(statistic, 30, groups=[""] * 30) == bootstrap_interval(statistic, 30)


def test_degenerate_intervals() -> None:
    one = bootstrap_interval(MeanStatistic("x", [2.5]), 1, resamples=20)
    assert (one.value, one.low, one.high, one.n) == (2.5, 2.5, 2.5, 1)
    perfect = bootstrap_interval(ConfusionStatistic("accuracy", [1, 0, 1], [1, 0, 1], 2), 3, resamples=20)
    assert (perfect.low, perfect.high) == (pytest.approx(0.025 ** (1 / 3)), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rare = AgreementStatistic("absolute_smd", [1, 1, 0], [0, 0, 1], low=0, high=1)
        found = bootstrap_interval(rare, 3, resamples=200)
        assert found.high == math.inf and not math.isnan(found.low)
        assert not math.isnan(paired_difference(rare, rare, 3, resamples=50).low)


@pytest.mark.parametrize("right", [1, 0])
def test_a_share_on_which_all_rows_agree_has_the_exact_interval(right: int) -> None:
    """0.6306 is the end of Clopper and Pearson's 95 % interval for 8 of 8, as SciPy's binomtest gives it."""
    said = np.full(8, right)
    shares = [
        MeanStatistic("exact_match", said),
        ConfusionStatistic("accuracy", said, np.ones(8, int), 2),
        AgreementStatistic("exact_agreement", said, np.ones(8, int), low=0, high=1),
    ]
    for share in shares:
        found = bootstrap_interval(share, 8)
        ends = (0.6306, 1) if right else (0, 1 - 0.6306)
        assert (found.value, found.n) == (right, 8)
        assert (found.low, found.high) == pytest.approx(ends, abs=1e-4)
        grouped = bootstrap_interval(share, 8, groups=["a", "a", "a", "a", "b", "b", "b", "b"])
        assert grouped.high - grouped.low == pytest.approx(1 - 0.025**0.5)  # two that are independent
    one = bootstrap_interval(MeanStatistic("loss", [1.0], higher_is_better=False), 1)
    assert (one.low, one.high) == (1, 1)  # no share


def test_a_difference_is_clear_only_where_interval_and_p_agree() -> None:
    right = np.array([1.0, 1, 1, 0, 1, 1, 1, 1])
    few = paired_difference(MeanStatistic("x", right), MeanStatistic("x", [0, 0, 1, 0, 0, 1, 1, 1]), 8)
    assert few.low > 0 and few.p_value > 0.05 and not few.clear
    many = paired_difference(
        MeanStatistic("x", np.tile(right, 5)), MeanStatistic("x", np.tile([0, 0, 1, 0, 0, 1, 1, 1], 5)), 40
    )
    assert many.low > 0 and many.p_value < 0.05 and many.clear


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "balanced_accuracy", "qwk", "exact_match", "kappa"])
def test_a_dominating_system_has_a_small_p(metric: str) -> None:
    good, gold = scores(200, 0.1, seed=2)
    poor, _ = scores(200, 0.6, seed=2)
    a, b = (next(s for s in all_statistics(p, gold) if s.name == metric) for p in (good, poor))
    forward, backward = paired_difference(a, b, 200, resamples=300), paired_difference(b, a, 200, resamples=300)
    assert forward.p_value == pytest.approx(1 / 301)
    assert forward.low > 0 and forward.low <= forward.difference <= forward.high
    assert forward.difference == -backward.difference and backward.high < 0
    assert backward.p_value == forward.p_value


def test_equal_systems_do_not_differ() -> None:
    predicted, gold = scores(50, 0.5)
    for statistic in all_statistics(predicted, gold):
        found = paired_difference(statistic, statistic, 50, resamples=100)
        assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_p_is_uniform_under_the_null() -> None:
    p_values = []
    for trial in range(240):
        draw = generator(1000 + trial)
        gold = draw.integers(3, size=40)
        a, b = (
            ConfusionStatistic("macro_f1", np.where(draw.random(40) < 0.4, draw.integers(3, size=40), gold), gold, 3)
            for _ in range(2)
        )
        p_values.append(paired_difference(a, b, 40, resamples=99, seed=trial).p_value)
    share = [float(np.mean(np.array(p_values) <= level)) for level in (0.1, 0.5, 0.9)]
    assert share == pytest.approx([0.1, 0.5, 0.9], abs=0.09)


def test_p_equals_the_exact_sign_flip_test_of_a_mean() -> None:
    a, b = np.array([3.0, 5, 2, 8, 6, 4]), np.array([1.0, 4, 3, 5, 2, 1])
    d = a - b
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    exact = float(np.mean(np.abs(d @ signs) >= abs(d.sum()) - 1e-12))
    found = paired_difference(MeanStatistic("x", a), MeanStatistic("x", b), 6, resamples=20_000)
    assert found.p_value == pytest.approx(exact, abs=0.01)


def test_groups_are_swapped_together() -> None:
    # 150 rows, yet three independent groups: 4 of 8 sign patterns give a sum of at least 0.5 + 0.5 - 0.2
    a, b = MeanStatistic("x", np.repeat([0.5, 0.5, -0.2], 50)), MeanStatistic("x", np.zeros(150))
    groups = [f"g{row // 50}" for row in range(150)]
    assert paired_difference(a, b, 150, resamples=300).p_value < 0.01
    assert paired_difference(a, b, 150, groups=groups, resamples=4000).p_value == pytest.approx(0.5, abs=0.04)
    one = paired_difference(MeanStatistic("x", [1.0]), MeanStatistic("x", [0.0]), 1, resamples=50)
    assert (one.difference, one.low, one.high, one.p_value) == (1, 1, 1, 1)


def test_refused() -> None:
    mean = MeanStatistic("x", [1.0, 2.0])
    with pytest.raises(DataError, match="at least one row"):
        bootstrap_interval(mean, 0)
    with pytest.raises(DataError, match="resamples"):
        bootstrap_interval(mean, 2, resamples=0)
    with pytest.raises(DataError, match="confidence"):
        bootstrap_interval(mean, 2, confidence=95)
    with pytest.raises(DataError, match="one group a row"):
        bootstrap_interval(mean, 2, groups=["a"])
    with pytest.raises(DataError, match="each of the 2 rows"):
        paired_difference(mean, MeanStatistic("x", [1.0]), 2)
    with pytest.raises(DataError, match="different metrics"):
        paired_difference(mean, MeanStatistic("y", [1.0, 2.0]), 2)
    with pytest.raises(DataError, match="different metrics"):
        paired_difference(mean, ConfusionStatistic("accuracy", [0, 1], [0, 1], 2), 2)
    with pytest.raises(DataError, match="different gold labels"):
        one, other = (ConfusionStatistic("accuracy", [0, 1], gold, 2) for gold in ([0, 1], [1, 1]))
        paired_difference(one, other, 2)
    with pytest.raises(DataError, match="different gold scores"):
        one, other = (AgreementStatistic("qwk", [0, 1], gold, low=0, high=2) for gold in ([0, 1], [1, 1]))
        paired_difference(one, other, 2)
    with pytest.raises(DataError, match=r"finite.*row 1"):
        MeanStatistic("loss", [1.0, math.nan])
    with pytest.raises(DataError, match="at least one row"):
        MeanStatistic("loss", [])
    with pytest.raises(DataError, match="Did you mean `macro_f1`"):
        ConfusionStatistic("macro_f", [0], [0], 2)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="positive"):
        ConfusionStatistic("f1", [0], [0], 2, positive=2)


def test_only_statistics_that_can_be_swapped_are_compared() -> None:
    class Custom:
        name = "custom"
        higher_is_better = True

        def __call__(self, rows: np.ndarray) -> float:
            return float(rows.mean())

    assert bootstrap_interval(Custom(), 4, resamples=10).value == 1.5
    with pytest.raises(DataError, match="PairableStatistic"):
        paired_difference(Custom(), Custom(), 4)
