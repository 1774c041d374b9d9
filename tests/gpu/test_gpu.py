"""On a CUDA device: the engine's bits are those of the CPU, and runs train, go on and are measured there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.zo.conftest import Batch, batch_of, bits, row_losses, same_bits, tiny_net
from tunefork.workflows import finetune
from tunefork.zo import ZO
from tunefork.zo.kernels import Signs, accumulate_many_, draw_many, perturbed
from tunefork.zo.noise import KINDS, Kind, Stream, make_counters, make_terms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TERMS = make_terms([(1, 0, 0.3, 1, 0), (2, 0, -0.03, 0.99, 1), (2, 1, -1e-5, 1, 1), (9, 4, 1e-4, 0.5, 0)])


def moved(batch: Batch) -> Batch:
    return {name: tensor.cuda() for name, tensor in batch.items()}


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.cpu().reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(("kind", "dtype"), itertools.product(KINDS, DTYPES))
def test_kernels_give_the_bits_of_the_cpu(kind: Kind, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(257, 131) * 0.1).to(dtype)
    low = None if dtype == torch.float32 else torch.randint(-9000, 9000, weight.shape, dtype=torch.int16)
    counters = make_counters([(0, 1), (7, 0)])
    found = []
    for device in ("cpu", "cuda"):
        w, r = weight.to(device, copy=True), None if low is None else low.to(device, copy=True)
        drawn = draw_many(5, counters, (33, 5), kind=kind, dtype=dtype, scale=0.3, device=device)
        probe = perturbed(w, Stream(8, 1, 2), -1e-3, kind=kind, out=torch.empty_like(w), remainder=r)
        accumulate_many_(w, 17, TERMS, kind=kind, remainder=r)
        found.append([drawn, probe, w, *([] if r is None else [r])])
    assert all(same(ours, theirs) for theirs, ours in zip(*found, strict=True))


def test_signs_give_the_bits_of_the_cpu() -> None:
    signs = Signs([7, 2**64 - 1, 9], 4, [33, 8, 130])
    found = [
        (
            signs.draw_(5, torch.empty((3, 4, 171), dtype=torch.int8, device=device)),
            signs.accumulate_many_(torch.ones(8, 171, device=device), TERMS),
        )
        for device in ("cpu", "cuda")
    ]
    assert all(same(ours, theirs) for theirs, ours in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("options", [{"queries": 3}, {"queries": 3, "rows": "split", "estimator": "two_sided"}])
def test_one_pass_sees_what_pass_after_pass_sees(kind: str, options: dict[str, object]) -> None:
    found = []
    for stack in (None, 1):
        opt = ZO(tiny_net(kind).cuda(), epsilon=1e-2, lr=1e-2, stack=stack, **options)
        for step in range(4):
            opt.step_batch(row_losses, moved(batch_of(rows=5, seed=step)))
            assert opt.last is not None
            found.append((opt.last.loss, opt.last.gradients))
        assert (stack is None) == (opt.mode == "both sides in one pass")
    for (loss, slopes), (other, others) in zip(found[:4], found[4:], strict=True):
        assert loss == pytest.approx(other, rel=1e-4)
        assert slopes == pytest.approx(others, rel=2e-2, abs=2e-3)


def test_a_closure_is_mapped_over_both_sides() -> None:
    model, batch = tiny_net("llama").cuda(), moved(batch_of())
    opt = ZO(model, queries=1, estimator="two_sided", rows="split", epsilon=1e-2, lr=1e-3)
    first = opt.step(lambda: model(batch["input_ids"], labels=batch["input_ids"]).loss)
    for _ in range(200):
        loss = opt.step(lambda: model(batch["input_ids"], labels=batch["input_ids"]).loss)
    assert opt.mode == "both sides in one pass" and loss < first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["low_rank", "rademacher", "gaussian"])
def test_a_trajectory_made_here_is_replayed_on_a_cpu_bit_for_bit(
    direction: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_net("llama").to("cuda", dtype)
    start = bits(model)
    options = {"direction": direction, "queries": 2, "epsilon": 1e-2, "lr": 1e-4, "momentum": 0.5}
    if direction != "low_rank":
        options["train"] = ["*"]
    with ZO(model, trajectory=tmp_path / "log", **options) as opt:
        for step in range(8):
            opt.step_batch(row_losses, moved(batch_of(seed=step)))
        there = {name: tensor.cpu().clone() for name, tensor in opt.learned().items()}
    assert direction != "low_rank" or same_bits(bits(model), start)
    replayed = ZO.from_trajectory(tiny_net("llama").to(dtype), tmp_path / "log")
    here = replayed.learned()
    assert here.keys() == there.keys() and all(same(there[name], here[name]) for name in here)


@pytest.mark.parametrize("direction", ["low_rank", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_probes_leave_the_weights_as_they_were(direction: str, dtype: torch.dtype) -> None:
    model = tiny_net("gpt2").to("cuda", dtype)
    start = bits(model)
    opt = ZO(model, direction=direction, queries=2, lr=0.0, epsilon=1e-3)
    for step in range(10):
        opt.step_batch(row_losses, moved(batch_of(seed=step)))
    opt.detach()
    assert same_bits(bits(model), start)


def test_a_base_in_4_bits_is_trained_and_not_touched() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4") for _ in range(2))
    ).cuda()
    x, y = torch.randn(32, 64, device="cuda"), torch.randn(32, 64, device="cuda")
    model(x)  # bitsandbytes keeps a bias in what the first pass computes in, from then on
    start, opt = bits(model), ZO(model, lr=3e-3, epsilon=1e-2, train=["0.weight", "1.weight"])

    def losses(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]).float() - batch[1]).square().mean(1)

    first = opt.step_batch(losses, (x, y))
    for _ in range(300):
        last = opt.step_batch(losses, (x, y))
    assert last < 0.97 * first and same_bits(bits(model), start)


@pytest.mark.parametrize(("method", "adapter"), [("backprop", "lora"), ("backprop", "qlora"), ("zo", "none")])
def test_a_run_is_on_the_device_and_says_so(
    method: str, adapter: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """That it goes on where it was stopped, and what it learns, is the battery's, which takes the device it finds."""
    rows = tmp_path / "rows.csv"
    lines = [f"it was {word} {i},{label}" for i in range(20) for word, label in (("great", "good"), ("poor", "bad"))]
    rows.write_text("text,label\n" + "\n".join(lines) + "\n")
    done = finetune(
        {
            "model": str(tiny("llama")),
            "task": "classification",
            "adapter": adapter,
            "data": {"train": str(rows), "max_leaked": 1.0},
            "train": {"method": method, "max_steps": 6, "batch_size": 4},
            "evaluate": {"baselines": ["majority"]},
            "out": str(tmp_path / "run"),
        }
    )
    memory = done.result["peak_memory_bytes"]
    assert memory["kind"] == "allocated on the GPU"
    assert memory["value"] > 0 and memory["forecast"] > 0
