"""Epsilon and a first lr from measurements, on losses whose best ones are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.zo.conftest import batch_of, bits, row_losses, same_bits, tiny_net
from tunefork.zo import ZO


class Plain(nn.Module):
    """A module that reads its weight in its forward, so that a loss can be any function of it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (3 * (self.weight - 1).square().sum()).expand(len(x))


@pytest.mark.parametrize("queries", [1, 4])
def test_curvature_and_lr_of_a_quadratic(queries: int) -> None:
    opt = ZO(Plain(20), direction="rademacher", queries=queries, estimator="two_sided", rows="shared")
    found = opt.calibrate(lambda m, b: m(b), torch.zeros(50, 1))
    assert found.curvature == pytest.approx(6 * 20, rel=0.02)  # z^T H z with H = 6 I, |z|^2 = 20
    assert found.share == pytest.approx(0.5)  # fifty rows agree on fifty times 0.02, beside one
    assert found.lr == pytest.approx(0.25 * queries * 0.5 / 120, rel=0.05)
    assert ("1 query whose" if queries == 1 else "4 queries whose") in found.reason
    assert found.epsilon == 0.1  # a parabola's two-sided slope is exact at any distance
    assert opt.param_groups[0]["lr"] == found.lr and opt.param_groups[0]["epsilon"] == found.epsilon
    first = opt.step_batch(lambda m, b: m(b), torch.zeros(50, 1))
    for _ in range(120):
        last = opt.step_batch(lambda m, b: m(b), torch.zeros(50, 1))
    assert last < 0.3 * first


@pytest.mark.parametrize("rows", ["shared", "split"])
def test_more_rows_a_query_ask_for_larger_steps(rows: str) -> None:
    opt = ZO(Plain(20), direction="rademacher", queries=2, estimator="two_sided", rows=rows)
    few, many = (opt.calibrate(lambda m, b: m(b), torch.zeros(n, 1)) for n in (4, 16))
    seen = 1 if rows == "shared" else 2
    assert few.share == pytest.approx(0.02 * 4 / seen / (1 + 0.02 * 4 / seen))
    assert many.lr / few.lr == pytest.approx(many.share / few.share, rel=0.1)


def test_a_one_sided_probe_stays_where_curvature_does_not_tell() -> None:
    """One side of a parabola is off by half of its bend, which a probe of both does not see."""
    two, one = (
        ZO(Plain(20), direction="rademacher", queries=2, estimator=name, rows="shared").calibrate(
            lambda m, b: m(b), torch.zeros(2, 1)
        )
        for name in ("two_sided", "one_sided")
    )
    assert one.epsilon < two.epsilon == 0.1


def test_epsilon_stays_where_slopes_are_straight() -> None:
    """sin(w / 0.03), not where it does not bend: straight for steps well below 0.03 only."""

    class Wave(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(self.weight[0] / 0.03 + 0.3).expand(len(x)) + 2

    found = ZO(Wave(1), direction="rademacher", queries=1, estimator="two_sided", rows="shared").calibrate(
        lambda m, b: m(b), torch.zeros(2, 1)
    )
    assert found.epsilon == pytest.approx(0.01, rel=0.1)


def test_epsilon_stays_above_rounding() -> None:
    model, batch = tiny_net("llama"), batch_of(rows=8)
    fine = ZO(model, queries=4, estimator="two_sided").calibrate(row_losses, batch)
    coarse = ZO(tiny_net("llama").to(torch.bfloat16), queries=4, estimator="two_sided").calibrate(row_losses, batch)
    assert coarse.noise > 30 * fine.noise
    assert coarse.epsilon >= fine.epsilon


@pytest.mark.parametrize("options", [{}, {"normaliser": "rms"}, {"preset": "fzoo"}, {"momentum": 0.9}])
def test_nothing_is_learned_and_the_choice_trains(options: dict[str, Any]) -> None:
    model, batch = tiny_net("bert"), batch_of(rows=8)
    before = bits(model)
    opt = ZO(model, **{"queries": 4, **options})
    found = opt.calibrate(row_losses, batch)
    assert same_bits(before, bits(model)) and opt.steps == 0
    assert f"lr {found.lr:g}" in found.reason and f"epsilon {found.epsilon:g}" in found.reason
    first = opt.step_batch(row_losses, batch)
    for _ in range(80):
        last = opt.step_batch(row_losses, batch)
    assert last < 0.9 * first


def test_curvature_is_the_mean_over_batches_in_turn() -> None:
    """Batches of curvature 1 and 3 alternate; after eight lr suits 2, whichever came first."""
    opt = ZO(Plain(20), direction="rademacher", queries=2, estimator="two_sided", rows="shared")
    batches = [torch.full((4, 1), value) for value in (1.0, 3.0)]
    alone = opt.calibrate(lambda m, b: m(b) * b.mean(), batches[0])
    for first in (0, 1):
        found = None
        for i in range(8):
            found = opt.calibrate(lambda m, b: m(b) * b.mean(), batches[(first + i) % 2], before=found)
            assert found.forwards <= alone.forwards and found.batches == i + 1
        assert found is not None and found.curvature == pytest.approx(2 * alone.curvature, rel=0.05)
        assert found.lr == pytest.approx(alone.lr / 2, rel=0.05) == opt.param_groups[0]["lr"]
        assert found.epsilon == opt.param_groups[0]["epsilon"] and opt.steps == 0 and "8 batches" in found.reason


def test_later_curvature_is_a_running_mean() -> None:
    """A loss that bends three times as much from the tenth batch on: lr follows, a few batches later."""
    opt = ZO(Plain(20), direction="rademacher", queries=2, estimator="two_sided", rows="shared")
    flat, steep = (torch.full((4, 1), value) for value in (1.0, 3.0))
    found, lrs = None, list[float]()
    for i in range(50):
        found = opt.calibrate(lambda m, b: m(b) * b.mean(), flat if i < 10 else steep, before=found)
        lrs.append(found.lr)
    assert lrs[9] == pytest.approx(lrs[0], rel=0.05)
    assert lrs[9] > lrs[13] > lrs[17] > lrs[49] == pytest.approx(lrs[9] / 3, rel=0.05)
    found, lrs = None, []
    for i in range(30):
        found = opt.calibrate(lambda m, b: m(b) * b.mean(), steep if i < 10 else flat, before=found)
        lrs.append(found.lr)
    assert lrs[29] == pytest.approx(lrs[7], rel=0.02), "less than at first it is never taken to be"


@pytest.mark.parametrize("normaliser", ["none", "rms", "std"])
def test_a_rule_that_divides_slopes_by_their_size_has_lr_follow_it(normaliser: str) -> None:
    """A loss whose slopes are a quarter, and bend as before, from the tenth batch on."""

    class Bowl(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight - x.mean()).square().sum().expand(len(x))

    opt = ZO(Bowl(20), direction="rademacher", queries=8, rows="shared", estimator="two_sided", normaliser=normaliser)
    found, lrs, slopes = None, list[float](), list[float]()
    for i in range(60):
        found = opt.calibrate(lambda m, b: m(b), torch.full((4, 1), 1.0 if i < 10 else 0.25), before=found)
        lrs.append(found.lr)
        slopes.append(found.slope)
    assert slopes[59] == pytest.approx(slopes[9] / 4, rel=0.3)
    assert lrs[59] == pytest.approx(lrs[9] / (1 if normaliser == "none" else 4), rel=0.3)


@pytest.mark.parametrize("normaliser", ["none", "rms"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 10])
def test_a_later_batch_without_a_finite_loss_is_refused(at: int, value: float, normaliser: str) -> None:
    opt = ZO(Plain(20), direction="rademacher", queries=2, rows="shared", normaliser=normaliser)
    found = None
    for _ in range(at):
        found = opt.calibrate(lambda m, b: m(b), torch.zeros(4, 1), before=found)
    with pytest.raises(FloatingPointError, match="must be finite"):
        opt.calibrate(lambda m, b: m(b) * value, torch.zeros(4, 1), before=found)


def test_queries_without_rows_say_nothing() -> None:
    def lr(rows: int) -> float:
        opt = ZO(Plain(20), direction="rademacher", queries=8, rows="split", estimator="two_sided")
        return opt.calibrate(lambda m, b: m(b), torch.zeros(rows, 1)).lr

    assert lr(2) == pytest.approx(lr(8), rel=0.1)


def test_a_loss_that_does_not_bend_is_refused() -> None:
    opt = ZO(Plain(20), direction="rademacher")
    with pytest.raises(FloatingPointError, match="must bend along random directions"):
        opt.calibrate(lambda m, b: 0 * m(b), torch.zeros(4, 1))
    assert opt.param_groups[0]["lr"] == opt.options.lr


def test_a_closure_is_enough() -> None:
    model, batch = tiny_net("llama"), batch_of()
    opt = ZO(model, queries=1, estimator="two_sided")
    found = opt.calibrate(lambda: model(batch["input_ids"], labels=batch["input_ids"]).loss)
    assert found.share == pytest.approx(0.32 / 1.32) and "over 16 rows" in found.reason
    assert found.forwards >= 6 * 15


def test_a_loss_that_is_never_finite_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="finite near the weights"):
        ZO(Plain(3), direction="rademacher").calibrate(lambda m, b: m(b) * torch.nan, torch.zeros(8, 1))
