"""How fast this machine is: a few short measurements, kept for the life of the process."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tunefork.train.simulation import Matmul, Work

_MOST_FLOPS = {"cpu": 2e8}  # of one measured product; elsewhere:
_MOST_FLOPS_ACCELERATOR = 2e11
_MEASURED = 10  # shapes of matrix products measured at most, the costliest first
_MOVED = {"cpu": 2**22}
_MOVED_ACCELERATOR = 2**28
_TINY_OPERATIONS = 100
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of starting operations, and of what they do."""

    starting: float
    doing: float
    overlap: bool  # an accelerator is fed ahead: the slower of the two counts

    @property
    def seconds(self) -> float:
        return max(self.starting, self.doing) if self.overlap else self.starting + self.doing

    def scaled(self, size: float) -> Cost:
        """The same operations on `size` times as much data."""
        return Cost(self.starting, self.doing * size, self.overlap)


def cost(work: Work, device: torch.device) -> Cost:
    """How long the work takes on this device."""
    ranked = sorted(work.matmuls.items(), key=lambda item: -_flops(item[0]) * item[1])
    measured = sum(matmul_seconds(shape, device) * n for shape, n in ranked[:_MEASURED])
    flops = sum(_flops(shape) * n for shape, n in ranked[:_MEASURED])
    rest = sum(_flops(shape) * n for shape, n in ranked[_MEASURED:])
    doing = measured + (rest * measured / flops if flops else 0.0) + work.moved / bytes_per_second(device)
    return Cost(work.operations * operation_seconds(device), doing, device.type == "cuda")


@functools.lru_cache(maxsize=512)
def matmul_seconds(shape: Matmul, device: torch.device) -> float:
    """Seconds of a product [batch, m, k] x [batch, k, n], measured on fewer rows where it is large."""
    dtype, batch, m, k, n = shape
    budget = _MOST_FLOPS.get(device.type, _MOST_FLOPS_ACCELERATOR)
    share = min(1.0, budget / _flops(shape))
    small_batch = max(1, int(batch * share))
    rows = m if batch > 1 else max(16, int(m * share))
    rows = min(m, rows)
    columns = n if rows * k * n * small_batch * 2 <= 4 * budget else max(64, int(2 * budget / (small_batch * rows * k)))
    inner = k if rows * k * columns * small_batch * 2 <= 4 * budget else max(64, int(2 * budget / (rows * columns)))
    a = torch.ones(small_batch, rows, inner, dtype=dtype, device=device)
    b = torch.ones(small_batch, inner, columns, dtype=dtype, device=device)
    if small_batch == 1:
        a, b = a[0], b[0]
    taken = _least_seconds(lambda: a @ b, device)
    return taken * _flops(shape) / _flops((dtype, small_batch, rows, inner, columns))


@functools.lru_cache(maxsize=8)
def bytes_per_second(device: torch.device) -> float:
    """Bytes an elementwise operation reads and writes in a second, memory for its result included."""
    size = _MOVED.get(device.type, _MOVED_ACCELERATOR)
    a = torch.ones(size // 4, device=device)
    return 3 * size / _least_seconds(lambda: a * a, device)


@functools.lru_cache(maxsize=8)
def operation_seconds(device: torch.device) -> float:
    """Seconds an operation takes whatever its size, with the Python around it, forward and backward."""
    layer = torch.nn.Linear(2, 2, device=device)

    def chain() -> None:
        x = torch.ones(1, 2, device=device)
        for _ in range(_TINY_OPERATIONS // 4):
            x = layer(x) * 0.5
        x.sum().backward()
        layer.zero_grad()

    return _least_seconds(chain, device) / _TINY_OPERATIONS


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    taken = []
    for _ in range(_REPEATS):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return max(min(taken), 1e-9)  # what else the machine does only ever adds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _flops(shape: Matmul) -> float:
    _, batch, m, k, n = shape
    return 2.0 * batch * m * k * n
