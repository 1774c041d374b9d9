"""Whatever happens, the model is exactly at a finished step."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import tunefork.zo
from tests.zo.conftest import Batch, batch_of, bits, nf4_linear, row_losses, same_bits, tiny_net
from tunefork.zo import ZO, Reader


@pytest.mark.parametrize("options", [{}, {"direction": "gaussian"}, {"queries": 3, "momentum": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probes_with_lr_0_leave_no_trace(dtype: torch.dtype, options: dict[str, Any], batch: Batch) -> None:
    probes(tiny_net("llama").to(dtype), batch, options, 25)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"direction": "rademacher"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_probes_leave_no_trace(dtype: torch.dtype, options: dict[str, Any], batch: Batch) -> None:
    probes(tiny_net("llama").to(dtype), batch, options, 1000)


def probes(model: torch.nn.Module, batch: Batch, options: dict[str, Any], steps: int) -> None:
    before = bits(model)
    with torch.no_grad():
        shown = model(batch["input_ids"]).logits
        opt = ZO(model, lr=0.0, **options)
        for _ in range(steps):
            opt.step_batch(row_losses, batch)
        assert opt.steps == steps and same_bits(before, bits(model))
        assert torch.equal(shown, model(batch["input_ids"]).logits)


@pytest.mark.parametrize("steps", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_probes_leave_nf4_as_it_is(steps: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(nf4_linear(64, 64), torch.nn.Tanh())
    model, x = model.to("cpu"), torch.randn(4, 64)
    before = bits(model)
    with torch.no_grad():
        shown = model(x)
        opt = ZO(model, train=["0.weight"], lr=0.0)
        for _ in range(steps):
            opt.step_batch(lambda m, b: m(b).square().mean(1), x)
        assert same_bits(before, bits(model)) and torch.equal(shown, model(x))


class Break(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def breaking_at(call: int, action: Callable[[], None]) -> tuple[Callable[..., torch.Tensor], list[int]]:
    """A module hook that acts at the n-th call of any layer, in the middle of a pass."""
    count = [0]

    def hook(*_: Any) -> None:
        count[0] += 1
        if count[0] == call:
            action()

    return hook, count


def at_last_step(options: dict[str, Any], action: Callable[[], None], expected: type[BaseException]) -> None:
    """Breaks a step at many places; after each the model and the state are those of the last finished step."""
    batch, x = batch_of(), batch_of(seed=1)
    for call in (1, 7, 23, 40, 58):
        model = tiny_net("llama").train()
        opt = ZO(model, queries=1, estimator="two_sided", rows="shared", lr=1e-2, stack=1, **options)
        for _ in range(2):
            opt.step_batch(row_losses, batch)
        with torch.no_grad():
            shown, weights = model.eval()(x["input_ids"]).logits, bits(model)
        state = {k: v.clone() for k, v in opt.learned().items()}
        model.train()
        hook, count = breaking_at(call, action)
        handles = [m.register_forward_hook(hook) for m in model.modules()]
        with pytest.raises(expected):
            opt.step_batch(row_losses, batch)
        assert count[0] == call
        for handle in handles:
            handle.remove()
        assert model.training and opt.steps == 2
        assert same_bits(weights, bits(model))
        assert all(torch.equal(v, state[k]) for k, v in opt.learned().items())
        with torch.no_grad():
            assert torch.equal(shown, model.eval()(x["input_ids"]).logits)
        assert opt.step_batch(row_losses, batch) < 100


@pytest.mark.parametrize("options", [{}, {"direction": "rademacher"}])
def test_exceptions_inside_a_pass(options: dict[str, Any]) -> None:
    def fail() -> None:
        raise Break

    at_last_step(options, fail, Break)


@pytest.mark.parametrize("options", [{}, {"direction": "gaussian"}])
def test_ctrl_c_inside_a_pass(options: dict[str, Any]) -> None:
    at_last_step(options, lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt)


@pytest.mark.parametrize("options", [{}, {"direction": "rademacher"}])
def test_ctrl_c_at_any_time(options: dict[str, Any], tmp_path: Path) -> None:
    """Signals from another thread, at no chosen place: the state is that of as many steps as are in the log.

    One that a callback of the garbage collector swallows, as Hypothesis's does, is sent again.
    """

    def send(wait: float, landed: threading.Event) -> None:
        while not landed.wait(wait):
            os.kill(os.getpid(), signal.SIGINT)
            wait = 5.0

    batch, path = batch_of(), tmp_path / "run.zo"
    done = 0
    model = tiny_net("llama")
    opt = ZO(model, queries=2, estimator="two_sided", rows="split", lr=1e-3, trajectory=path, **options)
    for i in range(12):
        landed = threading.Event()
        sender = threading.Thread(target=send, args=(0.04 + 0.0171 * i, landed))
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                opt.step_batch(row_losses, batch)
                done += 1
        landed.set()
        sender.join()
    assert opt.steps == Reader(path).steps >= done > 0
    again = ZO(tiny_net("llama"), queries=2, estimator="two_sided", rows="split", lr=1e-3, trajectory=path, **options)
    again.catch_up()
    assert all(torch.equal(v, opt.learned()[k]) for k, v in again.learned().items())
    with torch.no_grad():
        ids = batch["input_ids"]
        assert torch.equal(model.eval()(ids).logits, again.model.eval()(ids).logits)


class Interrupted:
    """Ctrl-C at the n-th operation of the engine's own code that runs inside the block; `count` is of all of them."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def operation(self, frame: FrameType, event: str, arg: Any) -> Any:
        if ENGINE not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        self.count += 1
        if self.count == self.at:
            signal.raise_signal(signal.SIGINT)
        return self.operation

    def __enter__(self) -> Interrupted:
        sys.settrace(self.operation)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


ENGINE = str(Path(tunefork.zo.__file__).parent)


class Handing(torch.nn.Module):
    """Two layers, and a child that hands its weight itself to its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.giver, self.first, self.second = torch.nn.Module(), torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.giver.table = torch.nn.Parameter(torch.randn(6))
        self.giver.forward = lambda: self.giver.table.view(1, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self.giver()
        return self.second(self.first(x).tanh()) * table


def interrupted_everywhere(direction: str, stack: int | None, closure: bool, path: Path, places: int) -> None:
    """Ctrl-C at many operations of a first and of a later step; each time the run is whole and goes on to its bits."""

    def begin(log: Path | None) -> tuple[Handing, ZO, Callable[[], float]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, x = Handing().train(), torch.randn(4, 6)
        options = {"rank": 2, "max_rank": 4, "train": "trainable" if direction != "low_rank" else ["first", "second"]}
        opt = ZO(
            model,
            direction=direction,
            queries=2,
            estimator="two_sided",
            rows="split",
            lr=0.1,
            stack=stack,
            trajectory=log,
            **options,
        )

        def step() -> float:
            if closure:
                return opt.step(lambda: model(x).square().mean())
            return opt.step_batch(lambda m, b: m(b).square().mean(1), x)

        return model, opt, step

    model, opt, step = begin(None)
    hooks, states = [], [{k: v.clone() for k, v in opt.learned().items()}]
    for _ in range(4):
        step()
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))
        states.append({k: v.clone() for k, v in opt.learned().items()})
    for before in (0, 1):
        _, _, step = begin(None)
        for _ in range(before):
            step()
        with Interrupted(0) as watch:
            step()
        chance = random.Random(before)
        for at in sorted(chance.sample(range(1, watch.count + 1), min(places, watch.count))):
            path.unlink(missing_ok=True)
            model, opt, step = begin(path)
            for _ in range(before):
                step()
            with pytest.raises(KeyboardInterrupt), Interrupted(at):
                step()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and torch.is_grad_enabled()
            assert opt.steps == Reader(path).steps and opt.steps - before in (0, 1), at
            assert all(torch.equal(v, states[opt.steps][k]) for k, v in opt.learned().items()), at
            assert all(m.training for m in model.modules()), at
            while opt.steps < 4:
                step()
            assert all(torch.equal(v, states[4][k]) for k, v in opt.learned().items()), at
            assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks[3], at
            opt.detach()
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


EVERY_WAY = [("low_rank", 1, False), ("low_rank", None, False), ("low_rank", None, True), ("rademacher", None, False)]


@pytest.mark.parametrize(("direction", "stack", "closure"), EVERY_WAY)
def test_ctrl_c_at_any_operation(direction: str, stack: int | None, closure: bool, tmp_path: Path) -> None:
    interrupted_everywhere(direction, stack, closure, tmp_path / "run.zo", 25)


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "stack", "closure"), EVERY_WAY)
def test_ctrl_c_at_hundreds_of_operations(direction: str, stack: int | None, closure: bool, tmp_path: Path) -> None:
    interrupted_everywhere(direction, stack, closure, tmp_path / "run.zo", 400)


def test_signals_have_their_own_handlers_again(batch: Batch) -> None:
    before = signal.getsignal(signal.SIGINT)
    ZO(tiny_net("llama"), lr=1e-3).step_batch(row_losses, batch)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_step_may_run_in_another_thread(batch: Batch) -> None:
    opt = ZO(tiny_net("llama"), lr=1e-3)
    thread = threading.Thread(target=opt.step_batch, args=(row_losses, batch))
    thread.start()
    thread.join()
    assert opt.steps == 1


def test_a_full_disk_stops_before_the_update(batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = ZO(tiny_net("llama"), lr=1e-3, trajectory=tmp_path / "run.zo")
    opt.step_batch(row_losses, batch)
    before = {k: v.clone() for k, v in opt.learned().items()}
    assert opt.trajectory is not None

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(opt.trajectory, "append", full)
    with pytest.raises(OSError, match="No space"):
        opt.step_batch(row_losses, batch)
    assert opt.steps == 1 and all(torch.equal(v, before[k]) for k, v in opt.learned().items())


def killed_run(path: Path, seconds: float, moved: bool) -> None:
    """Trains in a process of its own until SIGKILL, `seconds` after its start or (`moved`) after its first record."""
    size = path.stat().st_size if path.exists() else 0
    child = os.fork()
    if not child:
        try:
            run_to(path, 1 << 30)
        finally:
            os._exit(1)
    give_up = time.monotonic() + 20
    while moved and not (path.exists() and path.stat().st_size > size) and time.monotonic() < give_up:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def run_to(path: Path | None, steps: int, **options: Any) -> dict[str, torch.Tensor]:
    """What a small run has learned after so many steps, going on where `path` ends."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2)).bfloat16()
    x = torch.randn(8, 12).bfloat16()
    opt = ZO(
        model,
        queries=2,
        estimator="two_sided",
        rows="split",
        lr=1e-2,
        momentum=0.3,
        normaliser="rms",
        trajectory=path,
        **options,
    )
    opt.catch_up()
    while opt.steps < steps:
        opt.step_batch(lambda m, b: m(b).float().square().sum(1), x)
    opt.detach()
    return opt.learned()


def survives_kills(folder: Path, kills: int) -> None:
    path = folder / "run.zo"
    instants = torch.rand(kills, generator=torch.Generator().manual_seed(0)) * 0.06
    for i, seconds in enumerate(instants.tolist()):
        killed_run(path, seconds, moved=i % 2 == 1)
    steps = Reader(path).steps if path.exists() else 0
    whole = run_to(None, steps + 2)
    assert steps > kills // 4
    assert all(torch.equal(v, whole[k]) for k, v in run_to(path, steps + 2).items())


def test_kills_lose_nothing(tmp_path: Path) -> None:
    survives_kills(tmp_path, 8)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    survives_kills(tmp_path, 100)


@pytest.mark.parametrize("direction", ["low_rank", "gaussian"])
def test_a_trajectory_cut_at_any_byte_goes_on_to_the_same_bits(direction: str, tmp_path: Path) -> None:
    whole, path = run_to(tmp_path / "whole.zo", 8, direction=direction), tmp_path / "cut.zo"
    data = (tmp_path / "whole.zo").read_bytes()
    header = Reader(tmp_path / "whole.zo").header
    for cut in range(header.size(6) + header.size(7) + 1):
        path.write_bytes(data[: len(data) - cut])
        assert all(torch.equal(v, whole[k]) for k, v in run_to(path, 8, direction=direction).items())
        assert path.read_bytes() == data


def cosine_of_bf16(steps: int, lr: float, options: dict[str, Any]) -> float:
    """Cosine of the change of logits in a bf16 model to that of the same coefficients on an fp32 copy.

    The learning rate must be one that a person would use: it lowers the loss.
    """
    batch, held_out = batch_of(rows=8), batch_of(rows=16, seed=5)
    coarse, fine = tiny_net("llama").to(torch.bfloat16).eval(), tiny_net("llama").to(torch.bfloat16).float().eval()
    with torch.no_grad():
        base = [m(held_out["input_ids"]).logits.float() for m in (coarse, fine)]
        opt = ZO(coarse, queries=1, estimator="two_sided", rows="shared", lr=lr, epsilon=1e-2, **options)
        other = ZO(fine, queries=1, estimator="two_sided", rows="shared", lr=lr, epsilon=1e-2, **options)
        losses = []
        for _ in range(steps):
            losses.append(opt.step_batch(row_losses, batch))
            assert opt.last is not None
            other.engine.catch_up([(opt.last.gradients, opt.last.terms)])
        assert sum(losses[-10:]) < sum(losses[:10])
        moved = [m(held_out["input_ids"]).logits.float() - b for m, b in zip((coarse, fine), base, strict=True)]
    return float(torch.nn.functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0))


@pytest.mark.parametrize("options", [{}, {"direction": "rademacher"}])
def test_bf16_learns_what_fp32_learns(options: dict[str, Any]) -> None:
    assert cosine_of_bf16(60, 3e-3, options) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"direction": "rademacher"}])
def test_bf16_learns_what_fp32_learns_in_a_thousand_steps(options: dict[str, Any]) -> None:
    assert cosine_of_bf16(1000, 3e-4, options) >= 0.99
