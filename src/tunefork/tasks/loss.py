"""A task's loss and scores from a model's logits: only where they are needed, and in fp32."""

from __future__ import annotations

from typing import Any

import torch

from tunefork.batch import Batch

_IGNORED = -100


def row_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """fp32 [R]: a row's loss, summed over what its weight counts (trained tokens, or 1).

    With `gold` it is the cross-entropy over candidates or classes; else that of the target tokens.
    """
    if batch.gold is None:
        sums, _ = _token_sums(model, batch)
        return torch.zeros(batch.rows, device=sums.device).index_add(0, batch.row, -sums)
    return -row_scores(model, batch).gather(1, batch.gold[:, None]).squeeze(1)


def row_scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """fp32 [R, C]: log-probabilities over candidates or classes; -inf where a row has fewer candidates.

    Candidates of several tokens are compared by their mean log-probability a token (length-normalised, as in MeZO).
    """
    if batch.head:
        return torch.log_softmax(model(**_inputs(batch)).logits.float(), dim=-1)
    if batch.options is not None:
        assert batch.read_at is not None
        logits = _logits_at(model, batch, batch.read_at)
        chosen = logits.gather(1, batch.options.clamp(min=0))
        return torch.log_softmax(chosen.masked_fill(batch.options < 0, -torch.inf), dim=-1)
    sums, counts = _token_sums(model, batch)
    return normalised_scores(sums / counts.clamp(min=1), batch.row, batch.rows)


def normalised_scores(means: torch.Tensor, row: torch.Tensor, rows: int) -> torch.Tensor:
    """[S] mean log-probabilities of candidates, in order, to [R, C] log-probabilities over each row's candidates."""
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    table = torch.full((rows, int(place.max()) + 1), -torch.inf, device=means.device)
    return torch.log_softmax(table.index_put((row, place), means), dim=-1)


def _token_sums(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """[S] summed log-probability of the target tokens of each sequence, and how many there are."""
    assert batch.targets is not None
    wanted = batch.targets != _IGNORED
    columns = wanted.any(0).nonzero().squeeze(1)
    if len(columns) == 0:
        columns = torch.zeros(1, dtype=torch.int64, device=wanted.device)
    logits = model(**_inputs(batch), logits_to_keep=columns).logits.float()  # [S, K, V]
    targets, kept = batch.targets[:, columns], wanted[:, columns]
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return -flat.view_as(targets).sum(1), kept.sum(1)


def _logits_at(model: torch.nn.Module, batch: Batch, at: torch.Tensor) -> torch.Tensor:
    """fp32 [S, V]: the logits at one position of each sequence."""
    rows = torch.arange(len(at), device=at.device)
    if _keeps_logits(model):
        columns, where = torch.unique(at, return_inverse=True)
        logits = model(**_inputs(batch), logits_to_keep=columns).logits
        return logits[rows, where].float()
    return model(**_inputs(batch)).logits[rows, at].float()


def _keeps_logits(model: torch.nn.Module) -> bool:
    """Whether the model is a decoder, whose forward takes `logits_to_keep`; masked models do not."""
    config: Any = model.config
    return not any("MaskedLM" in name for name in (config.architectures or ()))


def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.token_type_ids is not None:
        inputs["token_type_ids"] = batch.token_type_ids
    return inputs
