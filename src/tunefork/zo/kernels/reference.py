"""The kernels in plain torch, on any device: the definition that faster ones must equal bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from tunefork.zo.noise import PER_BLOCK, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL, Kind, Stream, normal_table

_CHUNK = 1 << 20  # elements at a time; a multiple of every PER_BLOCK
_LOW = 0xFFFFFFFF


def philox(key: int, first: int, count: int, step: int, query: int, device: torch.device) -> torch.Tensor:
    """Philox4x32-10 blocks first .. first + count of a stream: int64 [count, 4] of 32-bit words."""
    block = torch.arange(first, first + count, dtype=torch.int64, device=device)
    a, b = block & _LOW, (block >> 32) & _LOW
    c, d = torch.full_like(block, step), torch.full_like(block, query)
    low, high = key & _LOW, key >> 32
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap, which keeps their 64 bits; the mask after the shift takes the sign's copies away
        p, q = a * PHILOX_MULTIPLIERS[0], c * PHILOX_MULTIPLIERS[1]
        a, b, c, d = ((q >> 32) & _LOW) ^ b ^ low, q & _LOW, ((p >> 32) & _LOW) ^ d ^ high, p & _LOW
        low, high = (low + PHILOX_WEYL[0]) & _LOW, (high + PHILOX_WEYL[1]) & _LOW
    return torch.stack((a, b, c, d), dim=1)


@lru_cache(maxsize=8)
def _table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(normal_table()).to(device)


def _elements(stream: Stream, start: int, stop: int, kind: Kind, device: torch.device) -> torch.Tensor:
    """fp32 noise of elements start .. stop; `start` is a multiple of PER_BLOCK."""
    per_block = PER_BLOCK[kind]
    first, count = start // per_block, -(-(stop - start) // per_block)
    words = philox(stream.key, first, count, stream.step, stream.query, device).view(-1, 1)
    if kind == "rademacher":
        bits = (words >> torch.arange(32, device=device)) & 1
        return (bits.view(-1)[: stop - start] * 2 - 1).float()
    halves = (words >> torch.tensor([4, 20], device=device)) & 0xFFF
    return _table(device)[halves.view(-1)[: stop - start]]


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, _CHUNK):
        yield start, min(start + _CHUNK, size)


def draw_into(out: torch.Tensor, key: int, counters: np.ndarray, kind: Kind, scale: float) -> None:
    """out [n, elements] = round(fl32(scale) * z) of the streams (key, *counters[i])."""
    for row, (step, query) in zip(out, counters.tolist(), strict=True):
        for start, stop in _chunks(row.numel()):
            row[start:stop] = _elements(Stream(key, step, query), start, stop, kind, out.device) * _fp32(scale)


def perturb_into(
    out: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor | None, stream: Stream, kind: Kind, scale: float
) -> None:
    """out [elements] = round(fp32(weight, remainder) + fl32(scale * z))."""
    for start, stop in _chunks(out.numel()):
        value = join(weight[start:stop], None if remainder is None else remainder[start:stop])
        out[start:stop] = value + _elements(stream, start, stop, kind, out.device) * _fp32(scale)


def accumulate_into(
    target: torch.Tensor, remainder: torch.Tensor | None, key: int, terms: np.ndarray, kind: Kind
) -> None:
    """target [elements], with `remainder` for 16 bits: the terms in order, each rounded before the next."""
    for start, stop in _chunks(target.numel()):
        high = target[start:stop]
        low = None if remainder is None else remainder[start:stop]
        for step, query, coefficient, decay, _ in terms.tolist():
            noise = _elements(Stream(key, step, query), start, stop, kind, target.device)
            _part(high, low, join(high, low) * decay + noise * coefficient)


def join(high: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    """The fp32 numbers whose patterns, as integers, are those of `high` as fp32 plus `low`."""
    if low is None:
        return high.to(torch.float32, copy=True)
    return (high.float().view(torch.int32) + low).view(torch.float32)


def _part(high: torch.Tensor, low: torch.Tensor | None, value: torch.Tensor) -> None:
    """The inverse of `join`: `high` is nearest to the value (of two, bf16 takes the larger one), `low` the rest."""
    if low is None:
        high.copy_(value)
        return
    bits = value.view(torch.int32)
    if high.dtype == torch.bfloat16:
        high.view(torch.int16).copy_((bits + 0x8000) >> 16)
    else:
        high.copy_(value)
    low.copy_((bits - high.float().view(torch.int32)).clamp(-(1 << 15), (1 << 15) - 1))


def draw_signs(out: torch.Tensor, keys: np.ndarray, starts: np.ndarray, step: int, query: int) -> None:
    """out [rank, columns] int8: matrix m's signs [rank, size] in columns starts[m] .. starts[m + 1]."""
    for key, start, stop in zip(keys.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        part = out[:, start:stop]
        part.copy_(_elements(Stream(key, step, query), 0, part.numel(), "rademacher", out.device).view(part.shape))


def add_signs(target: torch.Tensor, keys: np.ndarray, starts: np.ndarray, rank: int, terms: np.ndarray) -> None:
    """target [rows, columns] fp32: the terms in order, to the matrices' columns of rows block * rank ... each."""
    signs = torch.empty((rank, target.shape[1]), dtype=torch.int8, device=target.device)
    for step, query, coefficient, decay, block in terms.tolist():
        if decay != 1:
            target.mul_(decay)
        draw_signs(signs, keys, starts, step, query)
        target[block * rank : (block + 1) * rank].add_(signs.float() * coefficient)


def _fp32(value: float) -> float:
    return float(np.float32(value))
