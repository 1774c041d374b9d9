"""A step, seen from outside: what it evaluates, in how many passes, and what it moves."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from tests.zo.conftest import (
    Batch,
    batch_of,
    bits,
    direction,
    loss_at,
    row_losses,
    same_bits,
    tiny_net,
)
from tunefork.zo import ZO, TensorRows
from tunefork.zo.directions import low_rank

KINDS = ("llama", "gpt2", "opt", "bert")
EPSILON = 1e-2


def sides(opt: ZO, model: torch.nn.Module, batch: Batch, query: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Row losses at +epsilon and -epsilon by functional_call."""
    with torch.no_grad():
        here = [loss_at(model, opt, lambda m: row_losses(m, batch), opt.steps, query, s * EPSILON) for s in (1, -1)]
    return here[0], here[1]


def slope(first: torch.Tensor, second: torch.Tensor, span: float = 2 * EPSILON) -> Any:
    return pytest.approx(float(first.mean() - second.mean()) / span, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", [None, 1])
def test_two_sides_are_those_of_moved_weights(kind: str, stack: int | None, batch: Batch) -> None:
    model = tiny_net(kind)
    opt = ZO(model, queries=1, estimator="two_sided", rows="shared", epsilon=EPSILON, lr=0.0, stack=stack)
    plus, minus = sides(opt, model.eval(), batch)
    loss = opt.step_batch(row_losses, batch)
    assert opt.last is not None
    assert loss == pytest.approx(float(plus.mean() + minus.mean()) / 2, rel=1e-6)
    assert opt.last.gradients[0] == slope(plus, minus)
    assert opt.mode == ("both sides in one pass" if stack is None else "side after side: 2 passes of at most 4 rows")
    opt.step_batch(row_losses, batch)
    assert opt.last.forwards == 2 * 4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_tensor_closure_is_mapped_over_both_sides(kind: str, batch: Batch) -> None:
    model = tiny_net(kind)
    opt = ZO(model, queries=1, estimator="two_sided", rows="split", epsilon=EPSILON, lr=0.0)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        return model(batch["input_ids"], labels=batch["input_ids"]).loss

    with torch.no_grad():
        model.eval()
        plus, minus = (loss_at(model, opt, lambda _: closure(), 0, 0, s * EPSILON) for s in (1, -1))
    calls.clear()
    opt.step(closure)
    assert len(calls) == 2  # the first look, and both sides at once
    assert opt.mode == "both sides in one pass"
    assert opt.last is not None and opt.last.gradients[0] == slope(plus, minus)


@pytest.mark.parametrize("stack", [None, 4])
@pytest.mark.parametrize("estimator", ["one_sided", "two_sided"])
def test_many_queries_of_a_closure_are_mapped_too(estimator: str, stack: int | None, batch: Batch) -> None:
    found, calls = [], []
    for width in (stack, 1):
        model = tiny_net("llama")
        opt = ZO(model, queries=5, estimator=estimator, epsilon=EPSILON, lr=1e-3, stack=width)

        def closure(model: torch.nn.Module = model) -> torch.Tensor:
            calls.append(1)
            return row_losses(model, batch).mean()

        opt.step(closure)
        calls.clear()
        loss = opt.step(closure)
        assert opt.last is not None and opt.last.forwards == (6 if estimator == "one_sided" else 10)
        found.append((loss, opt.last.gradients.tolist(), len(calls), opt.mode))
    (loss, slopes, passes, mode), (same, known, alone, _) = found
    assert loss == pytest.approx(same, rel=1e-6) and slopes == pytest.approx(known, rel=2e-3, abs=2e-4)
    assert (passes, mode) == (-(-alone // (stack or 2)), "both sides in one pass")


def test_the_default_maps_a_closure(batch: Batch) -> None:
    model = tiny_net("llama")
    with ZO(model) as opt:
        opt.step(lambda: row_losses(model, batch).mean())
        assert opt.mode == "both sides in one pass"


def test_what_a_closure_does_is_not_held_against_batches_nor_its_own_faults(batch: Batch) -> None:
    model, faults = tiny_net("llama"), [ValueError("the disk is gone")]
    opt = ZO(model)

    def closure() -> torch.Tensor:
        if opt.steps and faults:
            raise faults[0]
        return row_losses(model, batch).mean()

    opt.step(closure)
    with pytest.raises(ValueError, match="the disk is gone"):
        opt.step(closure)
    faults.clear()
    opt.step(closure)
    assert opt.mode == "both sides in one pass"
    opt.step(lambda: 1.0 + float(row_losses(model, batch).mean()))
    opt.step(lambda: closure().item())
    assert opt.mode.startswith("side after side")
    opt.step_batch(row_losses, batch)
    assert opt.mode == "both sides in one pass"


def test_a_closure_of_a_number_runs_side_after_side(batch: Batch) -> None:
    model = tiny_net("bert")
    opt = ZO(model, queries=2, estimator="two_sided", rows="shared", epsilon=EPSILON, lr=0.0)

    def errors() -> float:
        return float(row_losses(model, batch).mean())

    plus, minus = sides(opt, model.eval(), batch, query=1)
    opt.step(errors)
    assert opt.mode == "side after side: the closure returns float, not a tensor"
    assert opt.last is not None and opt.last.gradients[1] == slope(plus, minus)


def test_a_closure_that_vmap_refuses_runs_side_after_side(batch: Batch) -> None:
    model = tiny_net("llama")
    opt = ZO(model, queries=1, estimator="two_sided", rows="split", epsilon=EPSILON, lr=0.0)

    def closure() -> torch.Tensor:
        losses = row_losses(model, batch)
        return losses.mean() if losses.max().item() > 0 else losses.sum()

    plus, minus = sides(opt, model.eval(), batch)
    opt.step(closure)
    assert opt.mode.startswith("side after side: torch.func.vmap refuses the closure")
    assert opt.last is not None and opt.last.gradients[0] == slope(plus, minus)


@pytest.mark.parametrize("stack", [None, 1])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_split_queries_probe_their_own_rows(kind: str, stack: int | None) -> None:
    model, batch = tiny_net(kind), batch_of(rows=5)
    opt = ZO(model, queries=3, estimator="two_sided", rows="split", epsilon=EPSILON, lr=0.0, stack=stack)
    model.eval()
    expected = []
    for query, rows in enumerate([slice(0, 1), slice(1, 3), slice(3, 5)]):
        plus, minus = sides(opt, model, batch, query)
        share = (rows.stop - rows.start) * 3 / 5
        expected.append(float(plus[rows].mean() - minus[rows].mean()) / (2 * EPSILON) * share)
    opt.step_batch(row_losses, batch)
    assert opt.last is not None
    assert opt.last.gradients.tolist() == pytest.approx(expected, rel=2e-3, abs=2e-4)
    opt.step_batch(row_losses, batch)
    assert opt.last.forwards == 2 * 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"estimator": "one_sided", "rows": "shared"}, {"estimator": "two_sided"}])
def test_all_groups_at_once_see_what_group_after_group_sees(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    found = []
    for one_by_one in (("cpu",), ()):
        monkeypatch.setattr(low_rank, "GROUP_BY_GROUP", one_by_one)
        opt = ZO(tiny_net(kind), queries=3, epsilon=EPSILON, lr=1e-2, **options)
        for step in range(3):
            opt.step_batch(row_losses, batch_of(rows=5, seed=step))
        assert opt.last is not None and opt.mode == "both sides in one pass"
        found.append((opt.last.loss, opt.last.gradients.tolist()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=5e-3, abs=1e-3)


@pytest.mark.parametrize("stack", [None, 1, 2])
def test_one_sided_queries_share_the_middle(stack: int | None, batch: Batch) -> None:
    model = tiny_net("llama")
    opt = ZO(model, queries=3, rows="shared", estimator="one_sided", epsilon=EPSILON, lr=0.0, stack=stack)
    middle = row_losses(model.eval(), batch).detach()
    expected = [float((sides(opt, model, batch, q)[0] - middle).mean()) / EPSILON for q in range(3)]
    loss = opt.step_batch(row_losses, batch)
    assert opt.last is not None
    assert opt.last.gradients.tolist() == pytest.approx(expected, rel=5e-3, abs=1e-3)
    assert loss == pytest.approx(float(middle.mean()), rel=1e-6)
    opt.step_batch(row_losses, batch)
    assert opt.last.forwards == 4 * 4


@pytest.mark.parametrize("options", [{}, {"direction": "rademacher"}, {"momentum": 0.5, "weight_decay": 0.1}])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_is_the_sum_of_the_steps(kind: str, options: dict[str, Any], batch: Batch) -> None:
    model, free = tiny_net(kind), tiny_net(kind).eval()
    before = bits(model)
    opt = ZO(model, **{"queries": 2, "rows": "split", "lr": 0.02, "rank": 2, "max_rank": 8, **options})
    change = {s.name: torch.zeros_like(s.parameter) for s in opt.sites}
    for _ in range(6):  # every base of the pool more than once
        opt.step_batch(row_losses, batch)
        assert opt.last is not None
        for term in opt.last.terms:
            for name in change:
                change[name] *= term.decay
                change[name] += term.coefficient * direction(model, name, opt, term.step, term.query)
    ids = {k: batch[k] for k in ("input_ids", "attention_mask")}
    weights = {name: before[name] + change[name] for name in change}
    with torch.no_grad():
        expected = torch.func.functional_call(free, weights, (), ids).logits
        assert torch.allclose(model.eval()(**ids).logits, expected, atol=3e-5)
        assert same_bits(before, bits(model)) == (opt.options.direction == "low_rank")
        opt.finish()
        assert torch.allclose(model(**ids).logits, expected, atol=3e-5)


class Weighted(TensorRows):
    """Rows that count as much as they have real tokens."""

    def weights(self, batch: Any) -> torch.Tensor:
        return batch["attention_mask"].sum(1).float()


@pytest.mark.parametrize("rows", ["shared", "split"])
def test_micro_batches_are_one_batch(rows: str) -> None:
    whole = batch_of(rows=6)
    parts = [{k: v[a:b] for k, v in whole.items()} for a, b in ((0, 1), (1, 4), (4, 6))]

    def token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return row_losses(model, batch) * batch["attention_mask"].sum(1)

    seen = []
    for batches in ([whole], parts):
        opt = ZO(tiny_net("llama"), queries=2, estimator="two_sided", rows=rows, lr=1e-3, epsilon=EPSILON)
        loss = opt.step_batch(token_losses, *batches, rows=Weighted())
        assert opt.last is not None
        seen.append([loss, *opt.last.gradients.tolist()])
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)


class Mixed(torch.nn.Module):
    """A layer whose input has positions first, which cannot be told from rows by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = torch.nn.Linear(6, 6), torch.nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inside(x.transpose(0, 1)).transpose(0, 1).tanh()).mean((1, 2))


def test_what_cannot_be_stacked_is_found_out() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 8, 6)
    opt = ZO(model, queries=1, estimator="two_sided", rows="shared", epsilon=EPSILON, lr=0.0)
    with torch.no_grad():
        ends = [loss_at(model, opt, lambda m: m(x), 0, 0, s * EPSILON) for s in (1, -1)]
    opt.step_batch(lambda m, b: m(b), x)
    assert opt.mode.startswith("side after side: in one pass losses are off by")
    assert opt.last is not None and opt.last.gradients[0] == slope(*ends)


def in_batch_negatives(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """A contrastive loss: each row's depends on all others."""

    def embedded(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state.mean(1)  # pyright: ignore
        return torch.nn.functional.normalize(hidden.float(), dim=-1)

    alike = embedded(batch["input_ids"]) @ embedded(batch["input_ids"].flip(1)).T / 0.05
    return torch.nn.functional.cross_entropy(alike, torch.arange(len(alike)), reduction="none")


def test_rows_that_see_each_other_are_not_stacked(batch: Batch) -> None:
    found = []
    for stack in (None, 1):
        opt = ZO(tiny_net("llama"), lr=0.0, stack=stack)
        opt.step_batch(in_batch_negatives, batch)
        assert opt.last is not None
        found.append(opt.last.gradients)
        assert stack == 1 or opt.mode.startswith("side after side: a row's loss depends on others")
    assert np.array_equal(*found)


@pytest.mark.parametrize("of_all", [torch.mean, torch.std, lambda losses: -losses.mean()])
def test_losses_that_see_a_batchs_mean_or_spread_are_not_stacked(of_all: Any, batch: Batch) -> None:
    found = []
    for stack in (None, 1):
        opt = ZO(tiny_net("gpt2"), lr=0.0, stack=stack)
        opt.step_batch(lambda m, b: (losses := row_losses(m, b)) + 0.5 * of_all(losses), batch)
        assert opt.last is not None and opt.mode.startswith("side after side")
        found.append(opt.last.gradients)
    assert np.array_equal(*found)


def test_functions_of_one_code_that_hold_different_things_are_different(batch: Batch) -> None:
    def made(contrastive: bool) -> Any:
        return lambda m, b: in_batch_negatives(m, b) if contrastive else row_losses(m, b)

    for plain, other in (
        (made(False), made(True)),
        (torch.no_grad()(row_losses), torch.no_grad()(in_batch_negatives)),
        (partial(lambda f, m, b: f(m, b), row_losses), partial(lambda f, m, b: f(m, b), in_batch_negatives)),
    ):
        opt = ZO(tiny_net("llama"), lr=0.0)
        opt.step_batch(plain, batch)
        assert opt.mode == "both sides in one pass"
        opt.step_batch(other, batch)
        assert opt.mode.startswith("side after side: a row's loss depends on others")


def test_each_loss_must_prove_that_it_can_be_stacked(batch: Batch) -> None:
    def of_a_batch(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return row_losses(model, batch) * 4 / len(batch["input_ids"])

    opt, alone = ZO(tiny_net("llama"), lr=0.0), ZO(tiny_net("llama"), lr=0.0, stack=1)
    for made_anew in range(3):
        opt.step_batch(partial(lambda scale, m, b: row_losses(m, b) + 0 * scale, float(made_anew)), batch)
        assert opt.mode == "both sides in one pass" and opt.last is not None
        assert (opt.last.forwards == 16 * len(batch["input_ids"])) == (made_anew > 0)  # proven once
        alone.step_batch(row_losses, batch)
    for one in (opt, alone):
        one.step_batch(of_a_batch, batch)
    assert opt.last is not None and alone.last is not None
    assert opt.mode.startswith("side after side") and np.array_equal(opt.last.gradients, alone.last.gradients)


def test_a_loss_that_closes_over_what_is_not_there_yet_is_stacked(batch: Batch) -> None:
    def losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return row_losses(model, batch) if len(batch) else later

    opt = ZO(tiny_net("llama"), lr=0.0)
    opt.step_batch(losses, batch)
    assert opt.mode == "both sides in one pass"
    later = torch.zeros(1)


def test_a_loss_that_is_not_finite_proves_nothing(batch: Batch) -> None:
    opt, bad = ZO(tiny_net("llama"), lr=0.0), [True]

    def losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return row_losses(model, batch) * (torch.nan if bad[0] else 1.0)

    with pytest.raises(FloatingPointError):
        opt.step_batch(losses, batch)
    bad[0] = False
    opt.step_batch(losses, batch)
    assert opt.mode == "both sides in one pass"


class Keeps(torch.nn.Module):
    """A layer that keeps a running mean and what it computed last."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.all, self.named = way, [], {}
        self.inside, self.out = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inside(x).tanh()
        if self.way == "tensor":
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        elif self.way == "list":
            self.all.append(hidden.detach())
        else:
            self.named = {"last": hidden.detach()}
        return self.out(hidden)


@pytest.mark.parametrize("way", ["tensor", "list", "dict"])
def test_a_module_that_keeps_what_it_computes_is_not_mapped(way: str) -> None:
    torch.manual_seed(0)
    model, x, y = Keeps(way), torch.randn(8, 6), torch.randint(3, (8,))
    opt = ZO(model, queries=2, estimator="two_sided", lr=1e-2, epsilon=EPSILON)
    for _ in range(2):
        opt.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
        assert opt.mode.startswith(
            "side after side: torch.func.vmap refuses the closure: a module keeps what it computes"
        )
    assert model.mean.shape == (6,) and (float(model.mean.abs().sum()) > 0) == (way == "tensor")
    model(x)
    with warnings.catch_warnings(action="ignore"):
        copy.deepcopy(model)


@dataclass
class Rows:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    label: torch.Tensor
    name: str = "rows"


@pytest.mark.parametrize("made", [BatchEncoding, lambda batch: Rows(**batch), MappingProxyType, OrderedDict, dict])
def test_a_batch_stays_of_its_kind(made: Any, batch: Batch) -> None:
    def losses(model: torch.nn.Module, given: Any) -> torch.Tensor:
        if isinstance(given, BatchEncoding | Rows):
            return row_losses(model, {"input_ids": given.input_ids, "attention_mask": given.attention_mask})
        return row_losses(model, dict(given))

    opt, plain = ZO(tiny_net("llama"), lr=0.0), ZO(tiny_net("llama"), lr=0.0)
    opt.step_batch(losses, made(batch))
    plain.step_batch(row_losses, batch)
    assert opt.mode == "both sides in one pass"
    assert opt.last is not None and plain.last is not None
    assert np.array_equal(opt.last.gradients, plain.last.gradients)


def test_a_finite_loss_whose_step_is_not_finite_is_refused(batch: Batch, tmp_path: Path) -> None:
    with ZO(tiny_net("llama"), lr=1e5, trajectory=tmp_path / "t") as opt:
        with pytest.raises(FloatingPointError, match="What a step adds must be finite"):
            opt.step_batch(lambda m, b: row_losses(m, b).double() * 1e37, batch)
        assert opt.steps == 0 and not bool(opt.learned()["0/factors"].any())


ONE_SIDED = [{"rows": "split"}, {"rows": "shared"}]


@pytest.mark.parametrize("options", [{"estimator": "two_sided"}, *ONE_SIDED])
def test_rounding_by_the_size_of_a_pass_does_not_stop_stacking(options: dict[str, Any], batch: Batch) -> None:
    """As on a GPU, where the number of rows decides which products are made, and so how they round."""

    def rounded(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        losses = row_losses(model, batch)
        return losses + 1e-5 * len(losses)

    opt = ZO(tiny_net("llama"), queries=2, epsilon=EPSILON, lr=0.0, **options)
    opt.step_batch(rounded, batch)
    assert opt.mode == "both sides in one pass"


@pytest.mark.parametrize("options", ONE_SIDED)
def test_one_sided_queries_that_mix_rows_are_found_out(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    opt = ZO(Mixed(), queries=2, epsilon=EPSILON, lr=0.0, **options)
    opt.step_batch(lambda m, b: m(b), torch.randn(4, 8, 6))
    assert opt.mode.startswith("side after side: in one pass losses are off by")


class Summary(torch.nn.Module):
    """A layer that sees one place for all rows together."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.all = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.inside(x) * self.all(torch.ones(1, 6))).sum(1)


def test_what_does_not_divide_into_rows_is_found_out() -> None:
    torch.manual_seed(0)
    model, x = Summary(), torch.randn(4, 6)
    opt = ZO(model, queries=2, estimator="two_sided", rows="split", epsilon=EPSILON, lr=0.0)
    with torch.no_grad():
        ends = [loss_at(model, opt, lambda m: m(x), 0, 1, s * EPSILON)[2:] for s in (1, -1)]
    opt.step_batch(lambda m, b: m(b), x)
    assert opt.mode == "side after side: all.weight sees 1 places for 8 rows"
    assert opt.last is not None and opt.last.gradients[1] == slope(*ends)


@pytest.mark.parametrize("make", [lambda v: v.half(), lambda v: v.mean(), lambda v: v.tolist()])
def test_row_losses_must_be_fp32_rows(make: Callable[[torch.Tensor], Any], batch: Batch) -> None:
    opt = ZO(tiny_net("llama"))
    with pytest.raises(ValueError, match=r"must return fp32 losses \[rows\], here \[4\]"):
        opt.step_batch(lambda m, b: make(row_losses(m, b)), batch)


def test_a_closure_in_16_bit_is_refused(batch: Batch) -> None:
    model = tiny_net("llama")
    with pytest.raises(ValueError, match="one fp32 loss"):
        ZO(model).step(lambda: row_losses(model, batch).mean().bfloat16())


def test_a_loss_that_is_not_finite_stops_before_the_update(batch: Batch) -> None:
    model = tiny_net("llama").eval()
    opt = ZO(model, lr=1e-3)
    opt.step_batch(row_losses, batch)
    before = {k: v.clone() for k, v in opt.learned().items()}
    with pytest.raises(FloatingPointError, match="Try a smaller lr"):
        opt.step_batch(lambda m, b: row_losses(m, b) * torch.nan, batch)
    assert all(torch.equal(v, before[k]) for k, v in opt.learned().items())
    assert opt.steps == 1


def test_a_lower_loss_is_learned(batch: Batch) -> None:
    model = tiny_net("bert")
    opt = ZO(model, queries=8, estimator="two_sided", rows="shared", lr=0.05, epsilon=1e-3)
    first = opt.step_batch(row_losses, batch)
    for _ in range(60):
        last = opt.step_batch(row_losses, batch)
    assert last < 0.6 * first
