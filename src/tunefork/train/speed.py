"""How fast this machine is: a few short measurements, kept for the life of the process."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tunefork.train.simulation import Matmul, Work

_MOST_FLOPS = {"cpu": 4e8}  # of one measured product; elsewhere:
_MOST_FLOPS_ACCELERATOR = 2e11
_MEASURED = 8  # shapes of matrix products measured at most, the costliest first
_MOVED = {"cpu": 2**23}
_MOVED_ACCELERATOR = 2**28
_MAPPED = 2**25 + 2**20  # more than the C library keeps for itself
_TINY_OPERATIONS = 100
_REPEATS = 4
_LONG = 0.2  # seconds after which a measurement is not repeated


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
    if work.mapped:
        doing += work.mapped / mapped_bytes_per_second(device)
    return Cost(work.operations * operation_seconds(device), doing, device.type == "cuda")


@functools.lru_cache(maxsize=512)
def matmul_seconds(shape: Matmul, device: torch.device) -> float:
    """Seconds of a product [batch, m, k] x [batch, k, n], measured on a smaller one where it is large."""
    dtype, *sizes = shape
    while 2 * math.prod(sizes) > _MOST_FLOPS.get(device.type, _MOST_FLOPS_ACCELERATOR):
        largest = sizes.index(max(sizes))
        sizes[largest] //= 2
    batch, m, k, n = sizes
    a, b = torch.ones(batch, m, k, dtype=dtype, device=device), torch.ones(batch, k, n, dtype=dtype, device=device)
    if batch == 1:
        a, b = a[0], b[0]
    return _least_seconds(lambda: a @ b, device) * _flops(shape) / (2 * math.prod(sizes))


@functools.lru_cache(maxsize=8)
def bytes_per_second(device: torch.device) -> float:
    """Bytes an elementwise operation of some substance reads and writes in a second."""
    size = _MOVED.get(device.type, _MOVED_ACCELERATOR)
    values = torch.ones(size // 4, device=device)
    return 2 * size / _least_seconds(lambda: torch.nn.functional.silu(values), device)


@functools.lru_cache(maxsize=8)
def mapped_bytes_per_second(device: torch.device) -> float:
    """Bytes of memory fresh from the system that are filled in a second: every page is a trap into the kernel."""
    return _MAPPED / _least_seconds(lambda: torch.ones(_MAPPED // 4, device=device), device)


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
    """The least of a few times: what else the machine does only ever adds. With one thread it is left out at once."""
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    run()
    taken: list[float] = []
    while len(taken) < _REPEATS and sum(taken) < _LONG:
        _wait(device)
        started = clock()
        run()
        _wait(device)
        taken.append(clock() - started)
    return max(min(taken), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _flops(shape: Matmul) -> float:
    _, batch, m, k, n = shape
    return 2.0 * batch * m * k * n
