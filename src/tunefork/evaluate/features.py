"""Frozen features of a base model: what it knows about a text before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tunefork.errors import UnsupportedError
from tunefork.evaluate.batching import pack, padded
from tunefork.models import bare_model
from tunefork.render import Renderer


def text_ids(renderer: Renderer, text: str) -> tuple[list[int], int]:
    """The bare text as ids between the tokenizer's own special tokens, and how many were cut off its end to fit."""
    ids = list(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
    room = renderer.max_length - len(renderer.start) - len(renderer.end)
    kept = [*renderer.start, *ids[:room], *renderer.end]
    return kept or [renderer.pad], max(0, len(ids) - room)


def frozen_features(
    model: torch.nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    pad: int,
    device: torch.device,
    tokens_per_batch: int,
    compute: Callable[[], AbstractContextManager[object]],
    check: Callable[[], None],
) -> NDArray[np.float32]:
    """Mean over a text's tokens (special ones too) of the last hidden states, [texts, hidden] fp32, in the order given.

    The same for encoders and causal models, so that their probes compare: in a causal model the last token alone
    sees the whole text, but the mean is the better feature where nothing was trained to gather it there. Texts are
    token ids, none empty. The head on top of the model, whatever it is, is not run.
    """
    bare = bare_model(model)
    if not isinstance(bare, PreTrainedModel):
        raise UnsupportedError(
            f"Features come from a transformers model. Received {type(bare).__name__}. Try another baseline than probe."
        )
    backbone = bare.base_model
    rows: list[NDArray[np.float32] | None] = [None] * len(texts)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for group in pack([len(t) for t in texts], tokens_per_batch):
            check()
            ids, mask = padded([texts[i] for i in group], pad, device)
            with compute():
                states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            real = mask.unsqueeze(-1).float()
            pooled = (states * real).sum(1) / real.sum(1)
            for k, i in enumerate(group):
                rows[i] = pooled[k].cpu().numpy()
    model.train(was_training)
    return np.stack([r for r in rows if r is not None])
