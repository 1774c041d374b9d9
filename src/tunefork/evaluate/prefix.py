"""Candidates of several tokens that share a prompt: the prompt is run once, its cache serves every candidate."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tunefork.evaluate.batching import pack, padded
from tunefork.models import bare_model, has_learned_prefix

_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
_EXPANDABLE = (DynamicLayer, DynamicSlidingWindowLayer)

Tokens = Sequence[int]


def can_share_prefix(model: torch.nn.Module) -> bool:
    """Whether a prompt's cache can be handed to its candidates.

    It can for a decoder whose forward takes mask, positions, cache and logits_to_keep, whose layers all keep plain
    keys and values (full or sliding attention; not linear attention or state space), and which has no learned
    prefix: PEFT puts prefixes into the cache itself.
    """
    bare = bare_model(model)
    if not isinstance(bare, PreTrainedModel) or bare.config.is_encoder_decoder:
        return False
    if has_learned_prefix(model):
        return False
    known = inspect.signature(bare.forward).parameters
    if any(name not in known for name in _ARGUMENTS):
        return False
    return all(type(layer) in _EXPANDABLE for layer in DynamicCache(config=bare.config).layers)


def prefix_scores(
    model: torch.nn.Module,
    prompts: Sequence[Tokens],
    candidates: Sequence[Sequence[Tokens]],
    *,
    pad: int,
    device: torch.device,
    tokens_per_batch: int,
    compute: Callable[[], AbstractContextManager[object]],
    check: Callable[[], None],
) -> list[list[float]]:
    """Log-probability (nats, summed over tokens) of each candidate after its prompt, in the order given.

    Prompts must not be empty, nor candidates. A batch holds at most `tokens_per_batch` padded tokens, the cached
    ones counted, or one sequence. Requires `can_share_prefix(model)`; call it in eval and inference mode.
    """
    config: Any = bare_model(model).config
    scores: list[list[float]] = [[] for _ in prompts]
    for group in pack([len(p) for p in prompts], tokens_per_batch):
        check()
        ids, mask = padded([prompts[i] for i in group], pad, device, left=True)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with compute():
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=DynamicCache(config=config),
                use_cache=True,
                logits_to_keep=1,
            )
        first = torch.log_softmax(out.logits[:, -1].float(), dim=-1)  # [prompts, V]
        pairs = [(at, tuple(c)) for at, i in enumerate(group) for c in candidates[i]]
        sums = [0.0] * len(pairs)
        for part in pack([ids.shape[1] + len(c) for _, c in pairs], tokens_per_batch):
            check()
            rows = torch.tensor([pairs[k][0] for k in part], device=device)
            values = _continuations(model, out.past_key_values, mask, first, rows, [pairs[k][1] for k in part], compute)
            for k, value in zip(part, values, strict=True):
                sums[k] = value
        for (at, _), value in zip(pairs, sums, strict=True):
            scores[group[at]].append(value)
    return scores


def _continuations(
    model: torch.nn.Module,
    cache: DynamicCache,
    mask: torch.Tensor,
    first: torch.Tensor,
    rows: torch.Tensor,
    texts: Sequence[Tokens],
    compute: Callable[[], AbstractContextManager[object]],
) -> list[float]:
    """Summed log-probability of each text after the cached prompt `rows` points at; `first` [prompts, V]."""
    tokens, real = padded(texts, 0, rows.device)
    width = tokens.shape[1]
    total = first[rows, tokens[:, 0]]
    if width > 1:
        before = mask[rows]
        start = before.sum(1, keepdim=True)
        with compute():
            logits = model(
                input_ids=tokens[:, :-1],
                attention_mask=torch.cat([before, real[:, :-1]], dim=1),
                position_ids=start + torch.arange(width - 1, device=rows.device),
                past_key_values=_selected(cache, rows),
                use_cache=True,
            ).logits.float()
        chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
        total = total + (chosen * real[:, 1:]).sum(1)
    return total.tolist()


def _selected(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache of these rows. Layers replace their tensors and never write into them, so a shallow copy suffices."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen
