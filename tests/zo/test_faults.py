"""Faults that published zeroth-order code has, one test each."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.zo.conftest import Batch, batch_of, direction, loss_at, row_losses, tiny_net
from tunefork.zo import ZO


def test_the_base_is_not_drawn_again_between_probe_and_update(batch: Batch) -> None:
    """LOZO: on one step in fifty the update used another U than the probe."""
    model = tiny_net("llama").eval()
    opt = ZO(model, queries=1, estimator="two_sided", rows="shared", rank=2, max_rank=6, lr=1e-3, epsilon=1e-2)
    for step in range(7):  # over all bases and into the pool's second round
        before = {n: b @ a for n, (a, b) in opt.factors().items()}
        with torch.no_grad():
            learned = {f"{n}.weight": v for n, v in before.items()}
            ends = []
            for sign in (1, -1):
                moved = {
                    s.name: s.parameter + learned[s.name] + sign * 1e-2 * direction(model, s.name, opt, step, 0)
                    for s in opt.sites
                }
                opt.detach()
                weights = {f"model.{k}": v for k, v in moved.items()}
                ends.append(torch.func.functional_call(Rows(model), weights, (batch,)))
        opt.step_batch(row_losses, batch)
        assert opt.last is not None
        assert opt.last.gradients[0] == pytest.approx(float((ends[0] - ends[1]).mean()) / 2e-2, rel=5e-3, abs=1e-3)
        for name, (a, b) in opt.factors().items():
            added = b @ a - before[name]
            want = opt.last.terms[0].coefficient * direction(model, f"{name}.weight", opt, step, 0)
            assert torch.allclose(added, want, atol=1e-6)


class Rows(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return row_losses(self.model, batch)


@pytest.mark.parametrize("kind", ["low_rank", "rademacher", "gaussian"])
def test_parameters_of_one_shape_have_their_own_noise(kind: str) -> None:
    """es-fine-tuning-paper: the generator was seeded alike for every parameter."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    opt = ZO(model, direction=kind, train="trainable", queries=1, estimator="two_sided", rows="shared", lr=1.0)
    base = [m.weight.detach().clone() for m in model]
    opt.step_batch(lambda m, b: m(b).sum(1), torch.randn(2, 16))
    values = opt.values()
    changes = torch.stack([(values[f"{i}.weight"] - base[i]).flatten() for i in range(4)])
    assert float(torch.corrcoef(changes).fill_diagonal_(0).abs().max()) < 0.3


@pytest.mark.parametrize("preset", ["default", "mezo", "fzoo"])
def test_the_global_generators_are_not_touched(preset: str, batch: Batch) -> None:
    """MeZO: torch's generator is seeded four times a step, so that sampling depends on the optimizer."""
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    opt = ZO(tiny_net("llama", dropout=0.3).train(), preset=preset, lr=1e-4)
    opt.step_batch(row_losses, batch)
    opt.calibrate(row_losses, batch)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


def test_a_loss_that_draws_numbers_sees_the_same_on_both_sides(batch: Batch) -> None:
    model = tiny_net("llama")
    opt = ZO(model, queries=3, estimator="two_sided", rows="shared", epsilon=1e-3, lr=0.0)

    def noisy() -> float:
        return float(row_losses(model, batch).mean()) + 100 * float(torch.rand(()))

    torch.manual_seed(0)
    opt.step(noisy)
    assert opt.last is not None and float(np.abs(opt.last.gradients).max()) < 100
    after = torch.rand(())
    torch.manual_seed(0)
    torch.rand(())
    assert torch.equal(after, torch.rand(()))  # as if the loss had been evaluated once


def test_accumulation_keeps_the_direction() -> None:
    """Micro-batches of one step share its directions; the next step has others."""
    model = nn.Linear(8, 8, bias=False)
    x = torch.randn(8, 8)
    changes = []
    for batches in ([x], [x[:3], x[3:]], [x[:1], x[1:7], x[7:]]):
        with ZO(model, queries=2, estimator="two_sided", rows="shared", lr=1.0, epsilon=1e-2) as opt:
            opt.step_batch(lambda m, b: m(b).square().sum(1), *batches)
            changes.append(opt.factors()[""][1])
    assert torch.equal(changes[0].sign(), changes[1].sign()) and torch.equal(changes[0].sign(), changes[2].sign())
    assert torch.allclose(changes[0], changes[1], rtol=1e-3) and torch.allclose(changes[0], changes[2], rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_does_not_change_the_step(kind: str) -> None:
    batch = batch_of(rows=4, length=6)
    wider = {k: nn.functional.pad(v, (0, 5)) if v.ndim == 2 else v for k, v in batch.items()}
    seen = []
    for b in (batch, wider):
        opt = ZO(tiny_net(kind), queries=2, estimator="two_sided", rows="split", lr=1e-3, epsilon=1e-2)
        seen.append((opt.step_batch(row_losses, b), opt.last.gradients.tolist()))  # pyright: ignore
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-5)
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-2, abs=1e-3)


def test_tied_weights_are_moved_once(batch: Batch) -> None:
    model = tiny_net("gpt2").eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    opt = ZO(
        model,
        direction="rademacher",
        train=["transformer.wte"],
        queries=1,
        estimator="two_sided",
        rows="shared",
        epsilon=1e-2,
        lr=1e-2,
    )
    base = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        ends = [loss_at(model, opt, lambda m: row_losses(m, batch), 0, 0, s * 1e-2).mean() for s in (1, -1)]
    opt.step_batch(row_losses, batch)
    assert opt.last is not None
    assert opt.last.gradients[0] == pytest.approx(float(ends[0] - ends[1]) / 2e-2, rel=1e-3)
    step = (model.lm_head.weight - base).abs()
    assert torch.allclose(step, torch.full_like(step, abs(opt.last.terms[0].coefficient)), rtol=1e-3)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("direction", ["low_rank", "rademacher"])
def test_dropout_is_off_on_both_sides_and_on_again_after(kind: str, direction: str, batch: Batch) -> None:
    noisy, still = tiny_net(kind, dropout=0.5).train(), tiny_net(kind).eval()
    losses = []
    for model in (noisy, still):
        opt = ZO(model, direction=direction, queries=2, estimator="two_sided", rows="shared", lr=1e-3)
        losses.append([opt.step_batch(row_losses, batch) for _ in range(3)])
    assert losses[0] == losses[1]
    assert all(m.training for m in noisy.modules()) and not any(m.training for m in still.modules())


def test_losses_are_not_compared_in_16_bit() -> None:
    """MeZO in fp16: a loss near 1 moves in steps of 5e-4, so a slope at epsilon 1e-3 in steps of 0.24."""
    model = nn.Linear(64, 1, bias=False)
    opt = ZO(
        model,
        queries=1,
        estimator="two_sided",
        rows="shared",
        epsilon=1e-4,
        lr=0.0,
        direction="rademacher",
        train="trainable",
    )
    x = torch.randn(32, 64)
    opt.step_batch(lambda m, b: 700 + 1e-2 * m(b)[:, 0], x)
    assert opt.last is not None
    want = 1e-2 * float(x.mean(0) @ direction(model, "weight", opt, 0, 0)[0])
    # fp32 rows lose 6e-5 of 700 each, fp64 sums nothing more
    assert opt.last.gradients[0] == pytest.approx(want, abs=0.3)
    with pytest.raises(ValueError, match="rounded away"):
        opt.step_batch(lambda m, b: m(b)[:, 0].half(), x)
