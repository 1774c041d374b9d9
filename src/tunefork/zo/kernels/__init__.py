"""Noise put into tensors: drawn, beside a weight, and added to what is learned.

On the CPU the kernels are numba's (`cpu.py`, no compiler needed) where numba is installed; elsewhere they are plain
torch (`reference.py`). Both give the same bits, for any number of threads. Tensors are fp32, bf16 or fp16; arithmetic
is fp32, rounded to nearest even at the end.

Low-rank factors are kept transposed, so that a block of r ranks is whole rows: of a matrix [out, in] with K blocks,
A = [K r, in] is `draw_many` of K streams [r, in], U^T is [K r, out], and a probe's u^T is [r, out]. The learned change
is U A, in LoRA's names B A.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from tunefork.zo.kernels import reference
from tunefork.zo.noise import KINDS, TERM, Kind, Stream, make_counters, make_terms

__all__ = ["Signs", "accumulate_", "accumulate_many_", "draw", "draw_many", "exact", "have_numba", "perturbed"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def have_numba() -> bool:
    """Whether the fast CPU kernels can be used (`pip install 'tunefork[zo]'`)."""
    return importlib.util.find_spec("numba") is not None


def draw(
    stream: Stream,
    shape: Sequence[int],
    *,
    kind: Kind = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """scale * z of one stream as a tensor of `shape` (written to `out` where given)."""
    many = None if out is None else out.unsqueeze(0)
    counters = make_counters([(stream.step, stream.query)])
    drawn = draw_many(stream.key, counters, shape, kind=kind, dtype=dtype, device=device, scale=scale, out=many)
    return drawn[0] if out is None else out


def draw_many(
    key: int,
    counters: np.ndarray,
    shape: Sequence[int],
    *,
    kind: Kind = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[n, *shape]: scale * z of the streams (key, *counters[i]), each rounded once to `dtype`.

    Args:
        counters: uint32 [n, 2] of (step, query), see `make_counters`.
        out: a contiguous tensor [n, *shape] to write to; its dtype and device are then the ones used.
    """
    if out is None:
        out = torch.empty((len(counters), *shape), dtype=dtype, device=device)
    elif tuple(out.shape) != (len(counters), *shape):
        raise ValueError(f"`out` must have the shape {(len(counters), *shape)}. Received {tuple(out.shape)}.")
    _check(kind, out)
    _backend(out).draw_into(out.view(len(counters), -1), key, counters, kind, float(scale))
    return out


def perturbed(
    weight: torch.Tensor,
    stream: Stream,
    scale: float,
    *,
    kind: Kind = "rademacher",
    out: torch.Tensor,
    remainder: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = round(value + fl32(scale * z)), the value being the weight's, with its remainder where there is one.

    `weight` is untouched; `out` has its shape and dtype and may not share its memory.
    """
    _alike("out", out, weight)
    _check(kind, out)
    _check_remainder(remainder, weight)
    low = None if remainder is None else remainder.detach().contiguous().view(-1)
    _backend(out).perturb_into(out.view(-1), weight.detach().contiguous().view(-1), low, stream, kind, float(scale))
    return out


def accumulate_(
    target: torch.Tensor,
    stream: Stream,
    coefficient: float,
    *,
    kind: Kind = "rademacher",
    remainder: torch.Tensor | None = None,
    decay: float = 1.0,
) -> torch.Tensor:
    """target = target * decay + fl32(coefficient * z) in place; see `accumulate_many_`."""
    terms = make_terms([(stream.step, stream.query, coefficient, decay, 0)])
    return accumulate_many_(target, stream.key, terms, kind=kind, remainder=remainder)


def accumulate_many_(
    target: torch.Tensor,
    key: int,
    terms: np.ndarray,
    *,
    kind: Kind = "rademacher",
    remainder: torch.Tensor | None = None,
) -> torch.Tensor:
    """Many additions to `target` in order, in one sweep; bitwise what one call a term gives.

    A term multiplies the value by its decay (one fp32 rounding; 1 is exact) and adds fl32(coefficient * z(step, query))
    (one more).

    Args:
        target: contiguous or not; fp32, or bf16/fp16 together with `remainder`.
        terms: array of `noise.TERM`, see `make_terms`; their blocks do not matter here.
        remainder: int16 of the target's shape, zeros at first: what a 16-bit target leaves out of its fp32 value. The
            value's bit pattern, as an integer, is the target's as fp32 plus the remainder, which makes a bf16 target
            exactly an fp32 number; beside an fp16 one it is clipped, which matters below 6e-5 only.
    """
    _check(kind, target)
    _check_terms(terms, None)
    if target.dtype != torch.float32 and remainder is None:
        raise ValueError(
            f"`remainder` must be given for a target of {target.dtype}, which alone would round small changes away. "
            "Try torch.zeros(target.shape, dtype=torch.int16), kept from call to call."
        )
    _check_remainder(remainder, target)
    with torch.no_grad():
        value = target.detach().contiguous()
        low = None if remainder is None else remainder.detach().contiguous()
        _backend(value).accumulate_into(value.view(-1), None if low is None else low.view(-1), key, terms, kind)
        if not target.is_contiguous():
            target.copy_(value)
        if remainder is not None and low is not None and not remainder.is_contiguous():
            remainder.copy_(low)
    return target


def exact(weight: torch.Tensor, remainder: torch.Tensor | None) -> torch.Tensor:
    """The fp32 value of a weight and its remainder, as a new tensor; see `accumulate_many_`."""
    _check_remainder(remainder, weight)
    return reference.join(weight.detach(), remainder)


class Signs:
    """The Rademacher directions [rank, size] of many matrices, side by side as the columns of one tensor.

    Args:
        keys: of the matrices' streams.
        sizes: columns of each; element (i, j) of a matrix is element i * size + j of its stream.
    """

    def __init__(self, keys: Sequence[int], rank: int, sizes: Sequence[int]) -> None:
        self.rank = rank
        self.keys = np.array(keys, dtype=np.uint64)
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def draw_(self, step: int, out: torch.Tensor) -> torch.Tensor:
        """out [queries, rank, sum(sizes)], contiguous int8 = +1 or -1 by the streams (key, step, 0 .. queries)."""
        if out.dtype != torch.int8 or tuple(out.shape[1:]) != (self.rank, self.starts[-1]) or not out.is_contiguous():
            raise ValueError(
                f"`out` must be a contiguous int8 tensor of the shape [queries, {self.rank}, {int(self.starts[-1])}]. "
                f"Received {out.dtype} {tuple(out.shape)}."
            )
        _backend(out).draw_signs(out, self.keys, self.starts, make_counters((step, q) for q in range(len(out))))
        return out

    def accumulate_many_(self, target: torch.Tensor, terms: np.ndarray) -> torch.Tensor:
        """Many additions to the factors of all matrices in order; bitwise what one call a term gives.

        A term multiplies every row of the target by its decay, then adds coefficient * signs(step, query) to rows
        block * rank ... (block + 1) * rank.

        Args:
            target: contiguous fp32 [blocks * rank, sum(sizes)].
            terms: array of `noise.TERM`, see `make_terms`.
        """
        blocks, rest = divmod(target.shape[0], self.rank)
        if target.dtype != torch.float32 or rest or target.shape[1] != self.starts[-1] or not target.is_contiguous():
            raise ValueError(
                f"`target` must be contiguous fp32, a multiple of {self.rank} rows by {int(self.starts[-1])} columns. "
                f"Received {target.dtype} {tuple(target.shape)}."
            )
        _check_terms(terms, blocks)
        _backend(target).add_signs(target, self.keys, self.starts, self.rank, terms)
        return target


class _Traffic:
    """For tensors without memory, which torch has for trying out what a program would need: one sweep over each."""

    @staticmethod
    def perturb_into(out: torch.Tensor, weight: torch.Tensor, *_: Any) -> None:
        out.copy_(weight)

    @staticmethod
    def accumulate_into(target: torch.Tensor, *_: Any) -> None:
        target.add_(1.0)

    @staticmethod
    def draw_into(out: torch.Tensor, *_: Any) -> None:
        out.fill_(1.0)

    draw_signs, add_signs = draw_into, accumulate_into


def _backend(tensor: torch.Tensor) -> Any:
    if isinstance(tensor, FakeTensor):
        return _Traffic
    if tensor.device.type == "cpu" and have_numba():
        from tunefork.zo.kernels import cpu

        return cpu
    return reference


def _check(kind: Kind, tensor: torch.Tensor) -> None:
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}. Received {kind!r}.")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"Noise must go to fp32, bf16 or fp16. Received {tensor.dtype}. Try `model.float()`.")


def _check_remainder(remainder: torch.Tensor | None, weight: torch.Tensor) -> None:
    if remainder is not None and (weight.element_size() != 2 or remainder.dtype != torch.int16):
        raise ValueError(
            f"`remainder` must be int16, beside a bf16 or fp16 tensor. Received {remainder.dtype} beside "
            f"{weight.dtype}. Try torch.zeros(shape, dtype=torch.int16); `exact` gives the fp32 value of both."
        )
    if remainder is not None and (remainder.shape != weight.shape or remainder.device != weight.device):
        raise ValueError(
            f"`remainder` must have the tensor's shape and device, {tuple(weight.shape)} and {weight.device}. "
            f"Received {tuple(remainder.shape)} and {remainder.device}."
        )


def _check_terms(terms: np.ndarray, blocks: int | None) -> None:
    if terms.dtype != TERM or terms.ndim != 1:
        raise ValueError(f"`terms` must be a 1-D array of `noise.TERM`. Received {terms.dtype} {terms.shape}.")
    if blocks is not None and len(terms) and int(terms["block"].max()) >= blocks:
        raise ValueError(f"A term's block must be below {blocks}. Received {int(terms['block'].max())}.")


def _alike(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.shape != like.shape or tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"`{name}` must have the shape, dtype and device of the tensor it belongs to: {tuple(like.shape)}, "
            f"{like.dtype}, {like.device}. Received {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}."
        )
