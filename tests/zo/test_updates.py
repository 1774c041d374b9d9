"""Projected gradients to coefficients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefork.zo import ZO
from tunefork.zo.updates import Rule, Updates

GRADIENTS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=12)


def run(rule: Rule, gradients: list[list[float]], lr: float = 0.1, decay: float = 0.0) -> list[list]:
    updates, found = Updates(rule), []
    for step, g in enumerate(gradients):
        updates = updates.next(np.array(g, dtype=np.float32))
        found.append(updates.terms(step, lr, decay))
    return found


def test_sgd_divides_by_the_queries() -> None:
    terms = run(Rule(), [[2.0, -4.0]])[0]
    assert [(t.step, t.query, t.decay) for t in terms] == [(0, 0, 1.0), (0, 1, 1.0)]
    assert [t.coefficient for t in terms] == pytest.approx([-0.1, 0.2])


def test_coefficients_are_fp32() -> None:
    for term in run(Rule(normaliser="rms", momentum=0.5), [[1 / 3]] * 4)[-1]:
        assert term.coefficient == float(np.float32(term.coefficient))


def test_rms_is_adams_second_moment_for_dense_rademacher() -> None:
    """With one query and z = +-1, (g z)^2 = g^2 in every element: the same v, and the same step without momentum."""
    weight = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([weight], lr=0.1, betas=(0.0, 0.9), eps=1e-12)
    gradients = [3.0, -1.0, 0.5, 10.0]
    terms = run(Rule(normaliser="rms", beta=0.9), [[g] for g in gradients])
    for g, (term,) in zip(gradients, terms, strict=True):
        before = weight.detach().clone()
        weight.grad = torch.tensor([g])
        adam.step()
        assert term.coefficient == pytest.approx(float(weight - before), rel=1e-5)


def test_std_is_fzoos() -> None:
    losses, middle, epsilon = np.array([1.3, 0.9, 1.1]), 1.0, 1e-2
    terms = run(Rule(normaliser="std"), [((losses - middle) / epsilon).tolist()], lr=0.3)[0]
    expected = -0.3 / 3 * (losses - middle) / losses.std()
    assert [t.coefficient for t in terms] == pytest.approx(expected.tolist(), rel=1e-4)


def test_slopes_that_tie_are_no_leap_under_std() -> None:
    """As those of a metric can, whose spread is then zero."""
    for g in (np.full(8, -6.25), np.full(8, 0.5) + np.eye(8)[0] * 1e-6, np.zeros(8)):
        assert np.abs(Updates(Rule("std")).next(g.astype(np.float32)).past[0]).max() <= 10.01


def test_clipping() -> None:
    assert run(Rule(clip=0.5), [[2.0]])[0][0].coefficient == pytest.approx(-0.05)
    terms = run(Rule(clip_rms=2.0, beta=0.5), [[1.0], [1.0], [100.0]])
    assert [t[0].coefficient for t in terms] == pytest.approx([-0.1, -0.1, -0.2])


def test_decay_comes_once_and_first() -> None:
    terms = run(Rule(momentum=0.5), [[1.0, 1.0]] * 3, lr=0.1, decay=0.5)[-1]
    assert [t.decay for t in terms] == [float(np.float32(0.95))] + [1.0] * 5


@settings(max_examples=30, deadline=None)
@given(GRADIENTS, st.floats(0.05, 0.8))
def test_momentum_is_heavy_ball_on_past_directions(gradients: list[float], beta: float) -> None:
    total = dict.fromkeys(range(len(gradients)), 0.0)
    for terms in run(Rule(momentum=beta), [[g] for g in gradients], lr=1.0):
        for term in terms:
            total[term.step] += term.coefficient
    window = Rule(momentum=beta).window
    for step, g in enumerate(gradients):
        ages = min(window, len(gradients) - step)
        assert total[step] == pytest.approx(-g * sum(beta**a for a in range(ages)), rel=1e-4, abs=1e-5)
    assert beta ** (window - 1) >= 0.02 > beta**window


@settings(max_examples=30, deadline=None)
@given(GRADIENTS)
def test_a_state_that_is_loaded_goes_on_alike(gradients: list[float]) -> None:
    rule = Rule(normaliser="rms", momentum=0.7, clip_rms=3.0)
    updates = Updates(rule)
    for g in gradients:
        updates = updates.next(np.array([g, g / 2], dtype=np.float32))
    again = Updates(rule)
    again.load_state(updates.steps, updates.state())
    more = np.array([1.5, -2.0], dtype=np.float32)
    assert updates.next(more).terms(9, 0.1, 0.0) == again.next(more).terms(9, 0.1, 0.0)


def test_the_running_mean_is_corrected() -> None:
    assert run(Rule(normaliser="rms", beta=0.999), [[5.0]])[0][0].coefficient == pytest.approx(-0.1)
    assert math.isfinite(run(Rule(normaliser="rms"), [[0.0]])[0][0].coefficient)


@pytest.mark.parametrize("preset", ["mezo", "fzoo", "default"])
def test_presets_run(preset: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    x = torch.randn(16, 8)
    opt = ZO(model, preset=preset, lr=1e-3)
    losses = [opt.step_batch(lambda m, b: (m(b) - 1).square().mean(1), x) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
