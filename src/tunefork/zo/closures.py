"""Evaluating a closure's loss on the sides that a step asks for: mapped over two of them where that works.

A closure returns the loss of the same batch each time. `torch.func.vmap` maps one that returns a tensor over two sides
at a time; what it refuses, and a closure that returns a number, runs side after side.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch._C._functorch import is_batchedtensor  # pyright: ignore[reportMissingImports]

from tunefork.zo.directions.base import Group, Pass
from tunefork.zo.measured import Measured
from tunefork.zo.probes import LOSS_DTYPES, ONE_SIDE, Show, Stacking


class ClosureProbe:
    """The loss of a closure: a tensor with one element, or a number."""

    def __init__(self, model: torch.nn.Module, closure: Callable[[], Any], stacking: Stacking) -> None:
        self.model, self.closure, self.stacking, self.forwards = model, closure, stacking, 0

    def plain(self) -> None:
        self.forwards += 1
        value = self.closure()
        if not isinstance(value, torch.Tensor):
            self.stacking.refused["closure"] = f"the closure returns {type(value).__name__}, not a tensor"

    def measure(self, signs: tuple[int, int], show: Show) -> Measured:
        stacking, width = self.stacking, self.stacking.limit or 2
        stacking.passes, alone = 1, "" if width > 1 else "stacking is switched off"
        stacking.alone = (stacking.refused.get("closure", "") or alone) if show.stackable else ONE_SIDE
        order = [(0, 0)] if 0 in signs else []
        order += [(query, sign) for query in range(show.queries) for sign in dict.fromkeys(signs) if sign]
        found: dict[tuple[int, int], float] = {}
        for start in range(0, len(order), width):
            some, refusal = order[start : start + width], ""
            if len(some) > 1 and not stacking.alone:
                try:
                    found.update(zip(some, self._mapped(some, show), strict=True))
                    continue
                except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                    refusal = f"torch.func.vmap refuses the closure: {str(error).partition(chr(10))[0][:200]}"
            for query, sign in some:
                show.lane(query, sign, show.epsilon)
                self.forwards += 1
                found[query, sign] = _number(self.closure())
            if refusal:  # and not the closure's own fault, which comes up again when it runs alone
                stacking.alone = stacking.refused["closure"] = refusal
        sides = [np.array([found[query if s else 0, s] for query in range(show.queries)]) for s in signs]
        shares = np.full(show.queries, 1.0 / show.queries)
        return Measured(sides[0], sides[1], shares, self.forwards, None)

    def _mapped(self, lanes: Sequence[tuple[int, int]], show: Show) -> list[float]:
        queries = list(dict.fromkeys(query for query, _ in lanes))

        def side(scale: torch.Tensor) -> torch.Tensor:
            show(Pass(show.step, tuple(Group(query, 0, 1) for query in queries), 1, scale, mapped=True))
            return self.closure()

        scales = torch.zeros(len(lanes), len(queries), device=self.stacking.device)
        for lane, (query, sign) in zip(scales, lanes, strict=True):
            lane[queries.index(query)] = sign * show.epsilon
        with warnings.catch_warnings(), _nothing_kept(self.model):
            warnings.filterwarnings("ignore", "There is a performance drop")  # attention runs once a side
            losses = torch.func.vmap(side, randomness="same")(scales)
        self.forwards += len(lanes)
        return [_number(loss) for loss in losses]


@contextmanager
def _nothing_kept(model: torch.nn.Module) -> Iterator[None]:
    """Raises RuntimeError where a module has kept what it computed under vmap, which is of no use after it: a running
    mean, an auxiliary loss. What was there before is put back."""
    held_by = [held for m in model.modules() for held in (m.__dict__, m.__dict__["_buffers"])]
    before = [(held, {k: copy.copy(v) if type(v) in (list, dict) else v for k, v in held.items()}) for held in held_by]
    try:
        yield
    finally:
        kept = [
            (held, old, name)
            for held, old in before
            for name, value in held.items()
            if not name.startswith("_") and _batched(value)
        ]
        for held, old, name in kept:
            if name in old:
                held[name] = old[name]
            else:
                del held[name]
    if kept:
        raise RuntimeError(f"a module keeps what it computes, as `{kept[0][2]}`")


def _batched(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return is_batchedtensor(value)
    items = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return any(_batched(item) for item in items)


def _number(value: Any) -> float:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.dtype not in LOSS_DTYPES:
            raise ValueError(
                "A closure must return one fp32 loss, or a number: in 16 bit the difference of two losses is rounded "
                f"away. Received {tuple(value.shape)} {value.dtype}. Try computing the loss from logits.float()."
            )
        return value.item()
    if not isinstance(value, Real):
        raise ValueError(
            f"A closure must return one fp32 loss, or a number. Received {type(value).__name__}. "
            "Try lambda: model(**batch).loss."
        )
    return float(value)
