"""Rendered examples as one padded batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tunefork.batch import Batch
from tunefork.errors import DataError
from tunefork.render.rendered import Rendered

IGNORED = -100  # the label that PyTorch's cross-entropy skips

Piece = tuple[int, Sequence[int], Sequence[bool]]  # row, ids, which of them are trained


def text_batch(rendered: Sequence[Rendered], pad: int) -> Batch:
    """Rows as their text; the weight of a row is how many of its tokens are trained."""
    return _weighted(((row, r.ids, r.trained) for row, r in enumerate(rendered)), pad)


def answer_batch(rendered: Sequence[Rendered], pad: int) -> Batch:
    """Rows with their right candidate alone, as text to be predicted. Raises DataError for a row without one."""
    return _weighted((_with(row, r, _gold(r)) for row, r in enumerate(rendered)), pad)


def head_batch(rendered: Sequence[Rendered], pad: int) -> Batch:
    """Rows as their text, one class a row."""
    ids, mask, _, rows = _padded(((row, r.ids, r.trained) for row, r in enumerate(rendered)), pad)
    return Batch(ids, mask, rows, torch.ones(len(rendered)), gold=_golds(rendered), head=True)


def candidate_batch(rendered: Sequence[Rendered], pad: int) -> Batch:
    """Rows that choose among their candidates: at one position if all rows can, else one sequence a candidate."""
    weights, gold = torch.ones(len(rendered)), _golds(rendered)
    if any(r.fanned_out for r in rendered):
        every = (_with(row, r, c) for row, r in enumerate(rendered) for c in range(len(r.candidates)))
        ids, mask, targets, rows = _padded(every, pad)
        return Batch(ids, mask, rows, weights, targets=targets, gold=gold)
    ids, mask, _, rows = _padded(((row, r.ids, r.trained) for row, r in enumerate(rendered)), pad)
    options = torch.full((len(rendered), max(len(r.candidates) for r in rendered)), -1, dtype=torch.int64)
    for row, r in enumerate(rendered):
        options[row, : len(r.candidates)] = torch.tensor([c[0] for c in r.candidates])
    read_at = torch.tensor([r.read_at for r in rendered])
    return Batch(ids, mask, rows, weights, read_at=read_at, options=options, gold=gold)


def _with(row: int, r: Rendered, candidate: int) -> Piece:
    """The row's text followed by one of its candidates, which is trained."""
    ids = r.candidates[candidate]
    return row, (*r.ids, *ids), (*(False,) * len(r.ids), *(True,) * len(ids))


def _gold(r: Rendered) -> int:
    if r.example.gold is None:
        raise DataError(f"{r.example.source}: a row to learn from must carry its label. Received none.")
    return r.example.gold


def _golds(rendered: Sequence[Rendered]) -> torch.Tensor | None:
    """[R], or None when any row has no label."""
    golds = [r.example.gold for r in rendered if r.example.gold is not None]
    return torch.tensor(golds) if len(golds) == len(rendered) else None


def _weighted(sequences: Iterable[Piece], pad: int) -> Batch:
    ids, mask, targets, rows = _padded(sequences, pad)
    return Batch(ids, mask, rows, (targets != IGNORED).sum(1).float(), targets=targets)


def _padded(sequences: Iterable[Piece], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask, targets [S, T] padded on the right, and the row [S] of each sequence.

    A target stands at the position whose logits predict it, one before its own; a first token is predicted by none.
    """
    listed = list(sequences)
    width = max(len(ids) for _, ids, _ in listed)
    input_ids = torch.full((len(listed), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORED)
    for s, (_, ids, trained) in enumerate(listed):
        tokens = torch.tensor(ids, dtype=torch.int64)
        input_ids[s, : len(ids)], mask[s, : len(ids)] = tokens, 1
        use = torch.tensor(trained, dtype=torch.bool)[1:]
        targets[s, : len(ids) - 1][use] = tokens[1:][use]
    return input_ids, mask, targets, torch.tensor([row for row, _, _ in listed])
