"""The kernels in plain torch, on any device: the definition that faster ones must equal bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tunefork.zo.noise import PER_BLOCK, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL, Kind, Stream, normal_table

_CHUNK = 1 << 20  # elements at a time; a multiple of every PER_BLOCK
_SIGNS = 1 << 24  # of many matrices: more, since each chunk is a hundred launches on a GPU
_LOW = 0xFFFFFFFF


def philox(key: int, first: int, count: int, step: int, query: int, device: torch.device) -> torch.Tensor:
    """Philox4x32-10 blocks first .. first + count of a stream: int64 [count, 4] of 32-bit words."""
    block = torch.arange(first, first + count, dtype=torch.int64, device=device)
    c, d = torch.full_like(block, step), torch.full_like(block, query)
    return _philox(block & _LOW, (block >> 32) & _LOW, c, d, key & _LOW, key >> 32)


def _philox(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
    """The four counter words of blocks, under the halves of their keys: int64 [..., 4], broadcast."""
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap, which keeps their 64 bits; the mask after the shift takes the sign's copies away
        p, q = a * PHILOX_MULTIPLIERS[0], c * PHILOX_MULTIPLIERS[1]
        a, b, c, d = ((q >> 32) & _LOW) ^ b ^ low, q & _LOW, ((p >> 32) & _LOW) ^ d ^ high, p & _LOW
        low, high = (low + PHILOX_WEYL[0]) & _LOW, (high + PHILOX_WEYL[1]) & _LOW
    return torch.stack(torch.broadcast_tensors(a, b, c, d), dim=-1)


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


def draw_signs(out: torch.Tensor, keys: np.ndarray, starts: np.ndarray, counters: np.ndarray) -> None:
    """out [n, rank, columns] int8: by counter, matrix m's signs [rank, size] in columns starts[m] .. starts[m + 1]."""
    for part, pairs in _parts(out, counters):
        part.copy_(_signs(keys, starts, part.shape[1], pairs, out.device))


def add_signs(target: torch.Tensor, keys: np.ndarray, starts: np.ndarray, rank: int, terms: np.ndarray) -> None:
    """target [rows, columns] fp32: the terms in order, to the matrices' columns of rows block * rank ... each."""
    counters = np.stack([terms["step"], terms["query"]], axis=1)
    for some, pairs in _parts(terms, counters, rank * target.shape[1]):
        for signs, term in zip(_signs(keys, starts, rank, pairs, target.device), some, strict=True):
            if term["decay"] != 1:
                target.mul_(float(term["decay"]))
            first = int(term["block"]) * rank
            target[first : first + rank].add_(signs.float() * float(term["coefficient"]))


def _parts(items: Any, counters: np.ndarray, size: int | None = None) -> Iterator[tuple[Any, np.ndarray]]:
    """Items and their counters, as many at a time as have a chunk of elements, of `size` or their own each."""
    some = max(1, _SIGNS // max(1, items[0].numel() if size is None else size)) if len(items) else 1
    for start in range(0, len(items), some):
        yield items[start : start + some], counters[start : start + some]


def _signs(keys: np.ndarray, starts: np.ndarray, rank: int, counters: np.ndarray, device: torch.device) -> torch.Tensor:
    """int8 [n, rank, columns], all blocks of all matrices at once: on a GPU a launch costs more than a block."""
    block, low, high, place = _layout(tuple(keys.tolist()), tuple(starts.tolist()), rank, device)
    step, query = (torch.from_numpy(column.astype(np.int64)).to(device)[:, None] for column in counters.T)
    words = _philox(block, torch.zeros_like(block), step, query, low, high)  # [n, blocks, 4]
    bits = words.flatten(1)[:, place >> 5]
    return bits.bitwise_right_shift_(place & 31).bitwise_and_(1).mul_(2).sub_(1).to(torch.int8)


@lru_cache(maxsize=8)
def _layout(keys: tuple[int, ...], starts: tuple[int, ...], rank: int, device: torch.device) -> list[torch.Tensor]:
    """Of all matrices' blocks in order: counter, the key's halves; and the bit of each element [rank, columns]."""
    block, low, high, place, bits = [], [], [], [], 0
    for key, size in zip(keys, np.diff(starts).tolist(), strict=True):
        count = -(-rank * size // PER_BLOCK["rademacher"])
        block.append(torch.arange(count))
        low.append(torch.full((count,), key & _LOW))
        high.append(torch.full((count,), key >> 32))
        place.append(bits + torch.arange(rank * size).view(rank, size))
        bits += count * PER_BLOCK["rademacher"]
    return [
        torch.cat(block).to(device),
        torch.cat(low).to(device),
        torch.cat(high).to(device),
        torch.cat(place, 1).to(device),
    ]


def _fp32(value: float) -> float:
    return float(np.float32(value))
