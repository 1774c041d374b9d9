"""The kernels for the CPU in numba: bit for bit what `reference.py` gives, at the speed of memory.

A range of elements is worked through in tiles that stay in the first-level cache. Ranges are split over
`torch.get_num_threads()` Python threads (the kernels hold no GIL; numba's own threading layers may clash with torch's
OpenMP and are not used); an element's value does not depend on the split. 16-bit formats are converted by hand on their
bit patterns, to nearest even, since numba has no 16-bit floats.

Unsigned constants are cast everywhere, else numba computes in 64 bits and the loops are no longer vectorised.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numba import float32, int8, int16, int64, njit, uint16, uint32, uint64, void

from tunefork.zo.noise import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL, TERM, Kind, Stream, normal_table

_TILE = 4096  # elements: 16 KiB of fp32; a multiple of every PER_BLOCK
_SERIAL = 1 << 17  # additions below which threads cost more than they save
_FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASKS = np.uint32(1) << np.arange(32, dtype=np.uint32)
_OCTETS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 1, -1).astype(np.int8).view(np.uint64)[:, 0]
_NO_TABLE, _NO_REMAINDER = np.empty(0, np.float32), np.empty(0, np.int16)

_M0, _M1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)
_W0, _W1 = (np.uint32(w) for w in PHILOX_WEYL)
_1, _13, _16 = np.uint32(1), np.uint32(13), np.uint32(16)
_32 = np.uint64(32)

_f32s, _i16s, _u16s, _u32s = float32[::1], int16[::1], uint16[::1], uint32[::1]
_terms = numba.from_dtype(TERM)[::1]
_source = (_u32s, _f32s, uint64)  # masks, table, key
_stream = (*_source, uint32, uint32, float32)  # step, query, scale


def _kernel(*signature: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compiles for one signature when first called, and keeps the result where numba finds a folder to write to.

    Threads that come at once wait inside numba: a lock of ours would stay taken after a Ctrl-C at the wrong moment.
    """

    def decorated(function: Callable[..., None]) -> Callable[..., None]:
        @cache
        def compiled() -> Callable[..., None]:
            try:
                return njit(void(*signature), nogil=True, cache=True)(function)
            except (RuntimeError, OSError):  # no such folder, or a full disk
                return njit(void(*signature), nogil=True)(function)

        def call(*arguments: Any) -> None:
            compiled()(*arguments)

        return call

    return decorated


@njit
def _words(words, first, count, key, step, query):
    """Philox4x32-10 blocks first .. first + count of a stream, four words each."""
    for i in range(count):
        block = np.uint64(first + i)
        a, b = np.uint32(block), np.uint32(block >> _32)
        c, d = step, query
        low, high = np.uint32(key), np.uint32(key >> _32)
        for _ in range(PHILOX_ROUNDS):
            p, q = np.uint64(a) * _M0, np.uint64(c) * _M1
            a, b = np.uint32(np.uint32(q >> _32) ^ b ^ low), np.uint32(q)
            c, d = np.uint32(np.uint32(p >> _32) ^ d ^ high), np.uint32(p)
            low, high = np.uint32(low + _W0), np.uint32(high + _W1)
        words[4 * i] = a
        words[4 * i + 1] = b
        words[4 * i + 2] = c
        words[4 * i + 3] = d


@njit
def _signs(z, words, masks, plus, minus):
    """z = plus where its bit of the words is 1, minus where it is 0."""
    for j in range(z.size // 32):
        word, start = words[j], np.uint64(32 * j)
        for i in range(masks.size):  # 32; a constant here would be unrolled, and no longer vectorised
            z[start + np.uint64(i)] = plus if np.uint32(word & masks[i]) != np.uint32(0) else minus
    for e in range(z.size // 32 * 32, z.size):
        z[e] = plus if np.uint32(words[e // 32] & masks[e % 32]) != np.uint32(0) else minus


@njit
def _noise(z, words, first, masks, table, key, step, query, scale):
    """z = fl32(scale * noise) of the elements from `first`, a multiple of _TILE. Rademacher where `table` is empty."""
    size = z.size
    if table.size == 0:
        _words(words, first // 128, (size + 127) // 128, key, step, query)
        _signs(z, words, masks, scale, -scale)
    else:
        _words(words, first // 8, (size + 7) // 8, key, step, query)
        for j in range(size // 2):
            z[2 * j] = scale * table[(words[j] >> np.uint32(4)) & np.uint32(0xFFF)]
            z[2 * j + 1] = scale * table[words[j] >> np.uint32(20)]
        if size % 2:
            z[size - 1] = scale * table[(words[size // 2] >> np.uint32(4)) & np.uint32(0xFFF)]


@njit
def _widen(values, halves, form):
    """bf16 (form 1) or fp16 (form 2) patterns as fp32."""
    bits = values.view(np.uint32)
    if form == 1:
        for i in range(halves.size):
            bits[i] = np.uint32(halves[i]) << _16
        return
    for i in range(halves.size):
        rest = np.uint32(np.uint32(halves[i]) & np.uint32(0x7FFF))
        sign = np.uint32(np.uint32(np.uint32(halves[i]) ^ rest) << _16)
        shifted = np.uint32(rest << _13)
        # a subnormal: as the mantissa of a number from 2^-14 on, less 2^-14
        small = np.float32(np.uint32(shifted + np.uint32(113 << 23)).view(np.float32) - np.float32(2**-14))
        more = np.uint32(224 << 23) if rest >= np.uint32(0x7C00) else np.uint32(112 << 23)
        value = np.uint32(shifted + more) if rest >= np.uint32(0x0400) else small.view(np.uint32)
        bits[i] = np.uint32(value | sign)


@njit
def _narrow(halves, values, form):
    """fp32 as bf16 (form 1) or fp16 (form 2) patterns, to nearest even."""
    bits = values.view(np.uint32)
    if form == 1:
        for i in range(halves.size):
            odd = np.uint32(np.uint32(bits[i] >> _16) & _1)
            half = np.uint32(np.uint32(np.uint32(bits[i] + np.uint32(0x7FFF)) + odd) >> _16)
            number = np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
            halves[i] = np.uint16(half if number else np.uint32(0x7FC0))
        return
    for i in range(halves.size):
        rest = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        sign = np.uint32(np.uint32(bits[i] ^ rest) >> _16)
        odd = np.uint32(np.uint32(rest >> _13) & _1)
        normal = np.uint32(np.uint32(np.uint32(rest - np.uint32((112 << 23) - 0xFFF)) + odd) >> _13)
        # below 2^-14: a half added leaves the multiple of 2^-24, rounded, in the last bits
        small = np.uint32(np.float32(rest.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(126 << 23))
        half = normal if rest >= np.uint32(113 << 23) else small
        half = half if rest < np.uint32(143 << 23) else np.uint32(0x7C00)
        half = half if rest <= np.uint32(0x7F800000) else np.uint32(0x7E00)
        halves[i] = np.uint16(half | sign)


@njit
def _join(values, high, low, form):
    """The fp32 numbers whose patterns are those of `high` as fp32, plus `low`."""
    _widen(values, high, form)
    bits = values.view(np.int32)
    for i in range(low.size):
        bits[i] = np.int32(bits[i] + np.int32(low[i]))


@njit
def _part(high, low, values, other, form):
    """The inverse of `_join`, with `high` nearest to the values; exact for bf16, up to a clipped `low` for fp16."""
    bits, wide = values.view(np.int32), other.view(np.int32)
    if form == 1:
        for i in range(low.size):
            half = np.uint32(np.uint32(np.uint32(bits[i]) + np.uint32(0x8000)) >> _16)
            high[i] = np.uint16(half)
            low[i] = np.int16(np.uint32(bits[i]) - np.uint32(half << _16))
        return
    _narrow(high, values, form)
    _widen(other, high, form)
    for i in range(low.size):
        low[i] = np.int16(min(max(bits[i] - wide[i], -32768), 32767))


@_kernel(float32[:, ::1], int64, int64, uint32[:, ::1], *_source, float32)
def _draw32(out, start, stop, counters, masks, table, key, scale):
    words = np.empty(_TILE // 2, np.uint32)
    for first in range(start, stop, _TILE):
        for row in range(len(out)):
            part = out[row, first : min(first + _TILE, stop)]
            _noise(part, words, first, masks, table, key, counters[row, 0], counters[row, 1], scale)


@_kernel(uint16[:, ::1], int64, int64, uint32[:, ::1], *_source, float32, int64)
def _draw16(out, start, stop, counters, masks, table, key, scale, form):
    words, tile = np.empty(_TILE // 2, np.uint32), np.empty(_TILE, np.float32)
    for first in range(start, stop, _TILE):
        for row in range(len(out)):
            part = out[row, first : min(first + _TILE, stop)]
            z = tile[: part.size]
            _noise(z, words, first, masks, table, key, counters[row, 0], counters[row, 1], scale)
            _narrow(part, z, form)


@_kernel(_f32s, _f32s, int64, int64, *_stream)
def _perturb32(out, weight, start, stop, masks, table, key, step, query, scale):
    words, tile = np.empty(_TILE // 2, np.uint32), np.empty(_TILE, np.float32)
    for first in range(start, stop, _TILE):
        part, old = out[first : min(first + _TILE, stop)], weight[first : min(first + _TILE, stop)]
        z = tile[: part.size]
        _noise(z, words, first, masks, table, key, step, query, scale)
        for i in range(part.size):
            part[i] = old[i] + z[i]


@_kernel(_u16s, _u16s, _i16s, int64, int64, *_stream, int64)
def _perturb16(out, weight, remainder, start, stop, masks, table, key, step, query, scale, form):
    words, tiles = np.empty(_TILE // 2, np.uint32), np.empty((2, _TILE), np.float32)
    for first in range(start, stop, _TILE):
        part = out[first : min(first + _TILE, stop)]
        z, value = tiles[0, : part.size], tiles[1, : part.size]
        _noise(z, words, first, masks, table, key, step, query, scale)
        _join(value, weight[first : first + part.size], remainder[first : first + part.size], form)
        for i in range(part.size):
            value[i] += z[i]
        _narrow(part, value, form)


@_kernel(_f32s, int64, int64, _terms, *_source)
def _accumulate32(target, start, stop, terms, masks, table, key):
    words, tile = np.empty(_TILE // 2, np.uint32), np.empty(_TILE, np.float32)
    for first in range(start, stop, _TILE):
        value = target[first : min(first + _TILE, stop)]
        z = tile[: value.size]
        for term in terms:
            decay = term.decay
            _noise(z, words, first, masks, table, key, term.step, term.query, term.coefficient)
            for i in range(value.size):
                value[i] = value[i] * decay + z[i]


@_kernel(_u16s, _i16s, int64, int64, _terms, *_source, int64)
def _accumulate16(target, remainder, start, stop, terms, masks, table, key, form):
    words, tiles = np.empty(_TILE // 2, np.uint32), np.empty((3, _TILE), np.float32)
    for first in range(start, stop, _TILE):
        high, low = target[first : min(first + _TILE, stop)], remainder[first : min(first + _TILE, stop)]
        z, value, other = tiles[0, : high.size], tiles[1, : high.size], tiles[2, : high.size]
        _join(value, high, low, form)
        for term in terms:
            decay = term.decay
            _noise(z, words, first, masks, table, key, term.step, term.query, term.coefficient)
            for i in range(high.size):
                value[i] = value[i] * decay + z[i]
            if form == 2:  # bf16's two halves hold all of fp32, fp16's not quite
                _part(high, low, value, other, form)
                _join(value, high, low, form)
        if form == 1:
            _part(high, low, value, other, form)


@_kernel(int8[:, ::1], int64, int64, uint64[::1], int64[::1], uint32, uint32, uint64[::1])
def _draw_signs(out, first, last, keys, starts, step, query, octets):
    for m in range(first, last):
        size = starts[m + 1] - starts[m]
        words = np.empty((len(out) * size + 127) // 128 * 4, np.uint32)
        _words(words, 0, len(words) // 4, keys[m], step, query)
        eight, bits = np.empty(4 * len(words), np.uint64), words.view(np.uint8)
        for i in range(len(bits)):
            eight[i] = octets[bits[i]]
        z = eight.view(np.int8)
        for row in range(len(out)):
            part, signs = out[row, starts[m] : starts[m + 1]], z[row * size : (row + 1) * size]
            for i in range(size):  # a loop: numba copies slices one by one
                part[i] = signs[i]


@_kernel(float32[:, ::1], int64, int64, uint64[::1], int64[::1], int64, _terms, _u32s)
def _add_signs(target, first, last, keys, starts, rank, terms, masks):
    for m in range(first, last):
        size = starts[m + 1] - starts[m]
        count = (rank * size + 127) // 128
        words, tile = np.empty(4 * count, np.uint32), np.empty(rank * size, np.float32)
        for term in terms:
            if term.decay != np.float32(1):
                for row in range(len(target)):
                    value = target[row, starts[m] : starts[m + 1]]
                    for i in range(size):
                        value[i] *= term.decay
            _words(words, 0, count, keys[m], term.step, term.query)
            _signs(tile, words, masks, term.coefficient, -term.coefficient)
            for row in range(rank):
                value = target[term.block * rank + row, starts[m] : starts[m + 1]]
                z = tile[row * size : (row + 1) * size]
                for i in range(size):
                    value[i] += z[i]


def draw_into(out: torch.Tensor, key: int, counters: np.ndarray, kind: Kind, scale: float) -> None:
    """out [n, elements] = round(fl32(scale) * z) of the streams (key, *counters[i])."""
    noise = (counters, _MASKS, _table(kind), key, scale)
    array, form = _array(out), _FORMS[out.dtype]
    if form == 0:
        _split(out.shape[1], out.numel(), lambda start, stop: _draw32(array, start, stop, *noise))
    else:
        _split(out.shape[1], out.numel(), lambda start, stop: _draw16(array, start, stop, *noise, form))


def perturb_into(
    out: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor | None, stream: Stream, kind: Kind, scale: float
) -> None:
    """out [elements] = round(fp32(weight, remainder) + fl32(scale * z))."""
    noise = (_MASKS, _table(kind), *stream, scale)
    array, old, form = _array(out), _array(weight), _FORMS[out.dtype]
    if form == 0:
        _split(len(out), len(out), lambda start, stop: _perturb32(array, old, start, stop, *noise))
    else:
        low = _NO_REMAINDER if remainder is None else remainder.numpy()
        _split(len(out), len(out), lambda start, stop: _perturb16(array, old, low, start, stop, *noise, form))


def accumulate_into(
    target: torch.Tensor, remainder: torch.Tensor | None, key: int, terms: np.ndarray, kind: Kind
) -> None:
    """target [elements], with `remainder` for 16 bits: the terms in order, each rounded before the next."""
    noise = (terms, _MASKS, _table(kind), key)
    array, form, additions = _array(target), _FORMS[target.dtype], len(target) * len(terms)
    if remainder is None:
        _split(len(target), additions, lambda start, stop: _accumulate32(array, start, stop, *noise))
    else:
        low = remainder.numpy()
        _split(len(target), additions, lambda start, stop: _accumulate16(array, low, start, stop, *noise, form))


def draw_signs(out: torch.Tensor, keys: np.ndarray, starts: np.ndarray, counters: np.ndarray) -> None:
    """out [n, rank, columns] int8: by counter, matrix m's signs [rank, size] in columns starts[m] .. starts[m + 1]."""
    for array, (step, query) in zip(out.numpy(), counters, strict=True):
        work = lambda a, b: _draw_signs(array, a, b, keys, starts, step, query, _OCTETS)  # noqa: B023, E731
        _split(len(keys), array.size, work, grain=1)


def add_signs(target: torch.Tensor, keys: np.ndarray, starts: np.ndarray, rank: int, terms: np.ndarray) -> None:
    """target [rows, columns] fp32: the terms in order, to the matrices' columns of rows block * rank ... each."""
    array = target.numpy()
    work = lambda a, b: _add_signs(array, a, b, keys, starts, rank, terms, _MASKS)  # noqa: E731
    _split(len(keys), rank * target.shape[1] * len(terms), work, grain=1)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy()


def _table(kind: Kind) -> np.ndarray:
    return normal_table() if kind == "gaussian" else _NO_TABLE


def _split(size: int, additions: int, work: Callable[[int, int], None], *, grain: int = _TILE) -> None:
    """Runs `work(start, stop)` over ranges of 0 .. size on torch's threads, which start at multiples of `grain`."""
    threads = min(torch.get_num_threads(), -(-size // grain))
    if threads <= 1 or additions < _SERIAL:
        work(0, size)
        return
    step = -(-size // (threads * grain)) * grain
    ranges = [(start, min(start + step, size)) for start in range(0, size, step)]
    others = [_pool(os.getpid(), threads).submit(work, *part) for part in ranges[1:]]
    try:
        work(*ranges[0])
    finally:
        wait(others)
    for other in others:
        other.result()


@lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:  # a fork has no threads: it needs a pool of its own
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="tunefork-zo")
