"""Objectives: any value of a batch's answers is raised, from the answers that the probes give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.zo.conftest import LABELS, batch_of, bits, direction, row_losses, same_bits, tiny_net
from tunefork.zo import ZO, Objective, Reader

Answers = Sequence[tuple[int, int]]


def answers(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(predicted class, right one)."""
    said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    return list(zip(said.tolist(), batch["label"].tolist(), strict=True))


def accuracy(found: Answers) -> float:
    return float(np.mean([said == right for said, right in found]))


def macro_f1(found: Answers) -> float:
    scores = []
    for label in range(LABELS):
        hits = sum(said == right == label for said, right in found)
        rows = sum((said == label) + (right == label) for said, right in found)
        scores += [2 * hits / rows] if rows else []
    return float(np.mean(scores))


def qwk(found: Answers) -> float:
    said, right = np.array(found, dtype=float).T
    chance = np.mean(np.square(said[:, None] - right[None, :]))
    return float(1 - np.mean(np.square(said - right)) / chance) if chance else 0.0


VALUES = {"accuracy": accuracy, "macro_f1": macro_f1, "qwk": qwk}


def objective(name: str, **more: Any) -> Objective:
    return Objective(answers, VALUES[name], mean=name == "accuracy", **more)


@pytest.mark.parametrize("rows", ["split", "shared"])
@pytest.mark.parametrize("name", list(VALUES))
def test_a_metric_rises(name: str, rows: str) -> None:
    random, steps = torch.Generator().manual_seed(0), 200
    x = torch.randn(60, 10, generator=random)
    batch = {"x": x, "label": torch.bucketize(x[:, 0] + 0.5 * x[:, 1], torch.tensor([-0.5, 0.5]))}
    model = torch.nn.Sequential(torch.nn.Linear(10, 24), torch.nn.Tanh(), torch.nn.Linear(24, LABELS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))

    def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["label"], reduction="none")

    def said(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
        return list(zip(model(batch["x"]).argmax(-1).tolist(), batch["label"].tolist(), strict=True))

    goal = Objective(said, VALUES[name], mean=name == "accuracy")
    opt = ZO(model, train="trainable", queries=8, estimator="two_sided", rows=rows)
    before = VALUES[name](said(model, batch))
    lr = opt.calibrate(losses, batch, objective=goal).lr
    for step in range(steps):
        opt.step_batch(losses, batch, objective=goal, lr=lr * (1 - step / steps))
    assert VALUES[name](said(model, batch)) > before + 0.2


def moved(model: torch.nn.Module, opt: ZO, batch: dict[str, torch.Tensor], query: int, scale: float) -> Any:
    """Answers with every trained weight replaced by W + scale z."""
    new = {s.name: s.parameter.detach() + scale * direction(model, s.name, opt, 0, query) for s in opt.sites}

    def call(**inputs: torch.Tensor) -> Any:
        return torch.func.functional_call(model, new, (), inputs)

    return answers(call, batch)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", list(VALUES))
@pytest.mark.parametrize(("queries", "micro"), [(4, 1), (4, 3), (18, 1), (18, 3)])
def test_a_query_with_its_own_rows_moves_the_whole_batchs_value(name: str, queries: int, micro: int) -> None:
    """The others answer as the model stands; the definition, without engine, stacking or micro-batches.

    Of eighteen queries of twelve rows some have none, the first among them, and say nothing.
    """
    model, batch, epsilon = tiny_net("bert"), batch_of(rows=12), 0.3
    opt = ZO(model, queries=queries, estimator="two_sided", rows="split", epsilon=epsilon, lr=0.0)
    size = 12 // micro
    parts = [{k: v[i * size : (i + 1) * size] for k, v in batch.items()} for i in range(micro)]
    opt.step_batch(row_losses, *parts, objective=objective(name))
    assert opt.last is not None
    opt.detach()
    here, slopes = answers(model, batch), []
    for query in range(queries):
        sides = []
        for sign in (1, -1):
            rows = slice(12 * query // queries, 12 * (query + 1) // queries)
            mixed = list(here)
            mixed[rows] = moved(model, opt, batch, query, sign * epsilon)[rows]
            sides.append(VALUES[name](mixed))
        slopes.append(-queries * (sides[0] - sides[1]) / (2 * epsilon))
    assert opt.last.gradients == pytest.approx(np.array(slopes), rel=1e-5)
    if name != "accuracy":
        assert opt.last.loss == pytest.approx(-VALUES[name](here))  # what is logged is where the model stands
    assert opt.last.gradients.any()


def test_where_all_sides_tie_nothing_changes(tmp_path: Path) -> None:
    model, batch = tiny_net("bert"), batch_of(rows=8)
    never = Objective(answers, lambda found: 0.5)
    more = {"weight_decay": 0.1, "momentum": 0.5, "clip_rms": 3.0}
    opt = ZO(
        model, queries=4, estimator="two_sided", rows="split", lr=0.1, epsilon=0.3, trajectory=tmp_path / "log", **more
    )
    for _ in range(3):
        assert opt.step_batch(row_losses, batch, objective=never) == -0.5
    assert not any(tensor.any() for name, tensor in opt.learned().items() if "factors" in name)
    for _ in range(3):
        opt.step_batch(row_losses, batch, objective=objective("qwk"))
    factors = opt.learned()["0/factors"].clone()
    assert factors.any()
    opt.step_batch(row_losses, batch, objective=never)
    assert torch.equal(opt.learned()["0/factors"], factors)
    records = list(Reader(tmp_path / "log").records())
    still = [all(t.coefficient == 0 and t.decay == 1 for t in r.terms) for r in records]
    assert still == [True] * 3 + [False] * 3 + [True]


def test_answers_that_take_several_passes_run_side_after_side() -> None:
    model, batch = tiny_net("bert"), batch_of(rows=8)
    seen = []

    def one_by_one(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        seen.append(len(batch["label"]))
        return [answers(model, {k: v[i : i + 1] for k, v in batch.items()})[0] for i in range(len(batch["label"]))]

    gradients = []
    for found in (Objective(one_by_one, qwk, stackable=False), objective("qwk")):
        opt = ZO(model, queries=4, estimator="two_sided", rows="split", epsilon=0.3, lr=0.0)
        opt.step_batch(row_losses, batch, objective=found)
        assert opt.last is not None
        gradients.append(opt.last.gradients)
        assert opt.mode.startswith("side after side") == (not found.stackable)
        opt.detach()
    assert np.array_equal(*gradients)
    assert sorted(seen) == [2] * 8 + [8]


def test_calibration_chooses_an_epsilon_at_which_answers_change_and_learns_nothing() -> None:
    model, batch = tiny_net("bert"), batch_of(rows=24)
    before = bits(model)
    opt = ZO(model, queries=4, estimator="two_sided", rows="split")
    found = opt.calibrate(row_losses, batch, objective=objective("macro_f1"))
    assert same_bits(before, bits(model)) and opt.steps == 0
    assert f"epsilon {found.epsilon:g}" in found.reason and f"lr {found.lr:g}" in found.reason
    loss = ZO(tiny_net("bert"), queries=4, estimator="two_sided", rows="split").calibrate(row_losses, batch)
    assert found.epsilon >= loss.epsilon
    opt.step_batch(row_losses, batch, objective=objective("macro_f1"))
    assert opt.last is not None and np.mean(opt.last.gradients != 0) >= 0.5


@pytest.mark.parametrize("name", ["macro_f1", "qwk"])
def test_more_batches_bring_the_rates_of_different_seeds_together(name: str) -> None:
    first, eighth = [], []
    for seed in range(6):
        model = tiny_net("bert")
        before, opt = bits(model), ZO(model, queries=4, estimator="two_sided", rows="split", seed=seed)
        found = opt.calibrate(row_losses, batch_of(rows=24, seed=100 * seed), objective=objective(name))
        first.append(found.lr)
        for more in range(1, 8):
            batch, epsilon = batch_of(rows=24, seed=100 * seed + more), found.epsilon
            found = opt.calibrate(row_losses, batch, objective=objective(name), before=found)
            assert (found.batches, found.epsilon) == (more + 1, epsilon) and found.forwards > 0
        eighth.append(found.lr)
        assert same_bits(before, bits(model)) and opt.param_groups[0]["lr"] == found.lr
    assert max(eighth) / min(eighth) < 0.6 * max(first) / min(first)


@pytest.mark.parametrize("order", [1, -1])
def test_a_mean_is_calibrated_whichever_rows_a_query_sees(order: int) -> None:
    """Each query's probes are held against its own rows, not against the first one's."""
    model, batch = tiny_net("bert"), batch_of(rows=24)
    with torch.no_grad():
        right = torch.tensor([said == label for said, label in answers(model.eval(), batch)])
    rows = torch.argsort(order * right.int(), stable=True)
    sorted_rows = {name: tensor[rows] for name, tensor in batch.items()}
    opt = ZO(model, queries=4, estimator="two_sided", rows="split")
    found = opt.calibrate(row_losses, sorted_rows, objective=objective("accuracy"))
    assert found.epsilon == 0.32 and 0.2 < found.lr < 0.5


def test_a_batch_whose_probes_all_tie_says_nothing() -> None:
    opt = ZO(tiny_net("bert"), queries=4, estimator="two_sided", rows="split")
    found = opt.calibrate(row_losses, batch_of(rows=24), objective=objective("qwk"))
    tied = Objective(answers, lambda found: 1.0)
    again = opt.calibrate(row_losses, batch_of(rows=24), objective=tied, before=found)
    assert (again.lr, again.curvature, again.share, again.batches) == (found.lr, found.curvature, found.share, 2)
    with pytest.raises(FloatingPointError, match="must be finite"):
        opt.calibrate(row_losses, batch_of(rows=24), objective=Objective(answers, lambda f: np.nan), before=found)


def test_calibration_says_where_no_probe_changes_an_answer() -> None:
    opt = ZO(tiny_net("bert"), queries=4, estimator="two_sided", rows="split")
    with pytest.raises(ArithmeticError, match="no answer changes"):
        opt.calibrate(row_losses, batch_of(rows=8), objective=Objective(answers, lambda found: 1.0))


def test_an_answer_a_row() -> None:
    opt = ZO(tiny_net("bert"), queries=2, estimator="two_sided", rows="split")
    with pytest.raises(ValueError, match="an answer a row, here 4"):
        opt.step_batch(row_losses, batch_of(rows=8), objective=Objective(lambda m, b: [0], len, stackable=False))
