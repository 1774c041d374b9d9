"""Greedy answers, batched by length: they end at the end token, at a stop string, or at the longest length allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tunefork.evaluate.batching import pack
from tunefork.evaluate.prefix import bare_model


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer: its text without end token, stop string and surrounding space, and whether it ended by itself."""

    text: str
    stopped: bool


class _EndOfText(StoppingCriteria):
    """True for rows whose new text holds a stop string. Looks at new text only: a prompt may end in one."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int, check: Callable[[], None]) -> None:
        self.tokenizer, self.stop, self.start, self.check = tokenizer, stop, start, check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.check()
        if not self.stop:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        found = [any(s in text for s in self.stop) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


def end_tokens(model: torch.nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end token and those the model's generation config names."""
    config = getattr(bare_model(model), "generation_config", None)
    named = config.eos_token_id if config is not None else None
    ids = [named] if isinstance(named, int) else list(named or ())
    return tuple(sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}))


def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    device: torch.device,
    tokens_per_batch: int,
    compute: Callable[[], AbstractContextManager[object]],
    check: Callable[[], None],
) -> list[Generated]:
    """The most likely token at every place (greedy), for prompts of token ids, in the order given.

    Sampling settings and penalties a model ships in its generation config are not used: the same weights give the
    same answers. `stopped` is false where an answer was cut off at `max_new_tokens`.
    """
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    answers: list[Generated | None] = [None] * len(prompts)
    for group in pack([len(p) + max_new_tokens for p in prompts], tokens_per_batch):
        check()
        width = max(len(prompts[i]) for i in group)
        ids = torch.full((len(group), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for k, i in enumerate(group):
            ids[k, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[k, width - len(prompts[i]) :] = 1
        with compute():
            out = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_EndOfText(tokenizer, stop, width, check)]),
            )
        for i, new in zip(group, out[:, width:].tolist(), strict=True):
            answers[i] = _read(tokenizer, new, ends, stop)
    return [a for a in answers if a is not None]


def _read(tokenizer: Any, new: Sequence[int], ends: Sequence[int], stop: Sequence[str]) -> Generated:
    """What was said before the first end token or stop string, whichever comes first."""
    at = next((k for k, token in enumerate(new) if token in ends), None)
    said = new if at is None else new[:at]
    text = tokenizer.decode(said, skip_special_tokens=True)
    cuts = [where for s in stop if (where := text.find(s)) >= 0]
    if cuts:
        text = text[: min(cuts)]
    return Generated(text.strip(), at is not None or bool(cuts))
