"""What every bit of noise is: a pure function of (seed, name, purpose, step, query, element).

A `Stream` is a 64-bit key and two counters. Its words come from Philox4x32-10 (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011): word i is lane i % 4 of the block with counter (i // 4 low, i // 4 high, step, query)
under the key (low 32 bits, high 32 bits). Element e of a tensor, counted in row-major order, is

- `rademacher`: bit e % 32 of word e // 32; 1 is +1 and 0 is -1;
- `gaussian`: entry h >> 4 of `normal_table()`, h being half-word e % 2 (low half first) of word e // 2. The table holds
  4,096 quantiles of the normal distribution at unit variance: mean 0, variance 1, kurtosis 2.991, |z| < 3.67.

Nothing here reads or sets a global generator. A change of any of this is a new `NOISE_VERSION`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

NOISE_VERSION = 1

Kind = Literal["rademacher", "gaussian"]
KINDS: tuple[Kind, ...] = ("rademacher", "gaussian")
TABLE = 4096
PER_BLOCK: dict[Kind, int] = {"rademacher": 128, "gaussian": 8}
"""Elements served by one Philox block."""

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

TERM = np.dtype([("step", "<u4"), ("query", "<u4"), ("coefficient", "<f4"), ("decay", "<f4"), ("block", "<u4")])
"""One addition to a tensor: value * decay, then + coefficient * z(step, query) where the block is the element's own."""


class Stream(NamedTuple):
    """One noise tensor: `key` of 64 bits, `step` and `query` of 32 bits each."""

    key: int
    step: int = 0
    query: int = 0


def stream_key(seed: int, name: str, purpose: str) -> int:
    """The 64-bit key of a parameter's noise: BLAKE2b (8 bytes, little-endian) of seed, name and purpose.

    `purpose` keeps the uses of one parameter apart (its directions, its bases). The lengths are hashed too, so that no
    two triples run into each other.
    """
    parts = [str(int(seed)), name, purpose]
    text = "".join(f"{len(part)}:{part}," for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def make_terms(terms: Iterable[tuple[int, int, float, float, int]]) -> np.ndarray:
    """(step, query, coefficient, decay, block) tuples as an array of `TERM`."""
    return np.array(list(terms), dtype=TERM)


def make_counters(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """(step, query) pairs as a uint32 array [n, 2]."""
    return np.array(list(pairs), dtype=np.uint32).reshape(-1, 2)


@lru_cache(maxsize=1)
def normal_table() -> np.ndarray:
    """fp32 [4096]: normal quantiles at (i + 1/2) / 4096, scaled to unit variance; antisymmetric, so their mean is 0.

    They are computed in fp64 and rounded; no entry lies so near a rounding border that another libm could move it.
    """
    normal = NormalDist()
    upper = [normal.inv_cdf((i + 0.5) / TABLE) for i in range(TABLE // 2, TABLE)]
    size = math.sqrt(math.fsum(x * x for x in upper) / len(upper))
    half = np.array([x / size for x in upper], dtype=np.float32)
    return np.concatenate([-half[::-1], half])
