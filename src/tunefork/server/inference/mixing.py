"""Rows of one batch under LoRA adapters of their own.

PEFT's `adapter_names` gathers the rows of each adapter by a list of indices and scatters them back, in every layer; in
the short steps of an answer that takes three times as long as the products. Neighbours are a view, which costs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear


@contextmanager
def mixed(model: torch.nn.Module, names: Sequence[str | None], dtype: torch.dtype) -> Iterator[None]:
    """While it lasts, row i of what the model is given is computed under its LoRA adapter names[i]; None is none.

    PEFT's own adapters must be disabled: theirs would come on top. `dtype` is what products are computed in. Rows of
    one adapter may stand apart, but are then computed apart.
    """
    spans: list[tuple[str, slice]] = []
    end = 0
    for name, rows in itertools.groupby(names):
        begin, end = end, end + len(list(rows))
        if name is not None:
            spans.append((name, slice(begin, end)))
    with ExitStack() as hooks:
        for layer in model.modules() if spans else ():
            if isinstance(layer, LoraLayer):
                here = [(name, rows) for name, rows in spans if name in layer.lora_A]
                hooks.enter_context(layer.register_forward_hook(_adding(layer, here, dtype)))
        yield


def _adding(layer: LoraLayer, spans: Sequence[tuple[str, slice]], dtype: torch.dtype) -> Callable[..., None]:
    """A hook that adds scaling x B A x to the rows of each adapter, in place."""
    parts = []
    for name, rows in spans:
        a, b = (getattr(layer, side)[name].weight.to(dtype) for side in ("lora_A", "lora_B"))
        parts.append((rows, a, b, layer.scaling[name]))

    def add(layer: Any, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        for rows, a, b, scaling in parts:
            made[rows].add_(linear(linear(given[0][rows], a), b), alpha=scaling)

    return add
