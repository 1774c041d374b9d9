"""Rows of similar length together, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tunefork.models import bare_model
from tunefork.render import Rendered, Renderer

LOGITS = {"cpu": 2**24}
MORE_LOGITS = 2**26
"""Logits of one pass in evaluation, at most, by device: of large vocabularies they would outgrow all else."""


def text_tokens(model: torch.nn.Module, device: torch.device, budget: int) -> int:
    """Padded tokens of a pass that asks for logits at most of them: `budget`, or fewer of a large vocabulary."""
    config: Any = bare_model(model).config
    return min(budget, LOGITS.get(device.type, MORE_LOGITS) // config.get_text_config().vocab_size)


def choice_tokens(
    model: torch.nn.Module, device: torch.device, budget: int, renderer: Renderer, rows: Sequence[Rendered]
) -> int:
    """The same for rows of which a class or candidate is chosen: a head, or a decoder at one place a row, has few."""
    places = renderer.model_kind == "causal" and all(r.read_at is not None for r in rows)
    return budget if renderer.task.form == "head" or places else text_tokens(model, device, budget)


def pack(lengths: Sequence[int], budget: int, sequences: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in groups of at most `budget` padded tokens (a single row may be longer), longest first.

    `sequences[i]` is how many sequences of `lengths[i]` tokens row i becomes; 1 when absent. Longest first, so
    that a batch that does not fit memory is met at the start. A pure function: equal lengths keep their order.
    """
    fans = sequences if sequences is not None else [1] * len(lengths)
    groups: list[list[int]] = []
    width = filled = 0
    for i in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        if groups and (filled + fans[i]) * width <= budget:
            groups[-1].append(i)
            filled += fans[i]
        else:
            groups.append([i])
            width, filled = lengths[i], fans[i]
    return groups


def padded(
    texts: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [S, T] int64; with `left` the texts stand at the right end, so that the last position is a token."""
    width = max(len(text) for text in texts)
    ids = torch.full((len(texts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for k, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(len(text))
        ids[k, place] = torch.tensor(text)
        mask[k, place] = 1
    return ids.to(device), mask.to(device)
