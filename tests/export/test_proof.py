"""The arithmetic of the proof, on logits and predictions made up for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tunefork.errors import ExportError
from tunefork.export.proof import LIMIT, Answers, HeldOut, Proof, compare
from tunefork.recipe import DataSection, TaskSection
from tunefork.tasks import Example, Prediction, make_task

BASE = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
LEARNED = torch.tensor([[1.0, 1.0, -2.0], [2.0, 0.0, 0.0]])


def rows(kind: str = "classification") -> HeldOut:
    labels = ("bad", "good") if kind == "classification" else None
    task = make_task(TaskSection(name=kind), DataSection(), "causal", (), labels=labels)
    renderer: Any = None  # nothing is rendered here
    return HeldOut("dev", task, renderer, [Example("a"), Example("b")], [], 4096)


def said(probabilities: Sequence[float], logits: torch.Tensor = BASE + LEARNED) -> Answers:
    """Answers with these probabilities of `good`; the right labels are bad, good."""
    predictions = [
        Prediction(name, ("bad", "good")[p > 0.5], ("bad", "good")[gold], int(p > 0.5), gold, (1 - p, p))
        for name, p, gold in zip("ab", probabilities, (0, 1), strict=True)
    ]
    return Answers(logits, predictions)


def proof_of(merged: Answers, dtype: str = "bf16", **more: Any) -> Proof:
    return compare(BASE, said([0.2, 0.504]), merged, rows(), dtype, **more)


def test_the_ratio_is_the_share_of_what_was_learned_that_is_lost() -> None:
    assert proof_of(said([0.2, 0.504])).ratio == 0
    assert proof_of(said([0.2, 0.504], BASE)).ratio == 1
    tenth = proof_of(said([0.2, 0.504], BASE + 0.9 * LEARNED))
    assert math.isclose(tenth.ratio, 0.1, rel_tol=1e-5)
    assert not tenth.passed
    assert proof_of(said([0.2, 0.504], BASE + (1.001 - LIMIT) * LEARNED)).passed


def test_equal_logits_with_another_metric_fail() -> None:
    other = proof_of(said([0.8, 0.504]))
    assert other.ratio == 0
    assert other.unequal == ["accuracy", "macro_f1"]
    assert not other.passed


def test_a_tie_may_be_decided_otherwise_in_16_bit_only() -> None:
    assert proof_of(said([0.2, 0.497])).ties == 1
    assert proof_of(said([0.2, 0.497])).passed
    assert not proof_of(said([0.2, 0.497]), dtype="fp32").passed
    lead = compare(BASE, said([0.2, 0.6]), said([0.2, 0.497]), rows(), "bf16")
    assert (lead.ties, lead.passed) == (0, False)


def test_a_model_that_overflows_in_its_own_format_fails() -> None:
    fine = proof_of(said([0.2, 0.504]), own_arithmetic=BASE + 0.9 * LEARNED)
    assert fine.passed
    overflow = proof_of(said([0.2, 0.504]), own_arithmetic=torch.full_like(BASE, math.nan))
    assert not overflow.passed


@pytest.mark.parametrize("merged", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail(merged: float) -> None:
    assert not proof_of(said([0.2, 0.504], torch.full_like(BASE, merged))).passed


@pytest.mark.parametrize(("change", "why"), [(1e-7, "training changed something"), (math.nan, "must be finite")])
def test_without_something_learned_there_is_no_proof(change: float, why: str) -> None:
    trained = said([0.2, 0.504], BASE + change * LEARNED)
    with pytest.raises(ExportError, match=why):
        compare(BASE, trained, trained, rows(), "fp32")


@pytest.mark.parametrize(("loss", "passes"), [(1.0, True), (1.01, True), (1.1, False)])
def test_the_loss_of_texts_may_differ_by_rounding_only(loss: float, passes: bool) -> None:
    def texts(value: float) -> Answers:
        return Answers(BASE + LEARNED, [Prediction(s, "x", "x", loss=value, references=("x",)) for s in "ab"])

    assert compare(BASE, texts(1.0), texts(loss), rows("generation"), "bf16").passed == passes
