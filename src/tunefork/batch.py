"""A padded batch: rows as tensors, with what each row's loss and scores read from the model's output."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """R rows as S >= R right-padded sequences of T tokens (S > R when each candidate is a sequence of its own).

    A position t of `targets` holds the token that the logits at t must predict, or -100 where nothing is read.
    """

    input_ids: torch.Tensor  # [S, T] int64
    attention_mask: torch.Tensor  # [S, T] int64
    row: torch.Tensor  # [S] int64: which row a sequence belongs to
    weights: torch.Tensor  # [R] fp32: the row's share of the step's mean (tokens, or 1)
    targets: torch.Tensor | None = None  # [S, T] int64; text answers and multi-token candidates
    read_at: torch.Tensor | None = None  # [S] int64: position whose logits choose among `options`
    options: torch.Tensor | None = None  # [S, C] int64 token ids of single-token candidates, -1 where there are fewer
    gold: torch.Tensor | None = None  # [R] int64: right candidate or class
    beta: float | None = None  # each row's two candidates are a preferred text and another one; see preference_losses
    head: bool = False  # classes come from a classification head
    places: torch.Tensor | None = None  # [R] int64: which of the training rows these are

    @property
    def rows(self) -> int:
        return int(self.weights.shape[0])

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}
        return replace(self, **moved)
