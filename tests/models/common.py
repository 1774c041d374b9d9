"""A model, one batch and one optimiser step: what the tests of this room share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import CAUSAL
from tunefork.batch import Batch
from tunefork.models import autocast, inspect_model, load_model, load_tokenizer
from tunefork.models.facts import ModelFacts
from tunefork.recipe.schema import AdapterSection, ModelSection

CPU = torch.device("cpu")
LABELS = ("bad", "fine", "good")
TEXTS = ("It was great! The man lost his keys.", "I would not buy this again, Tom.")


def facts_of(folder: Path | str, **section: Any) -> ModelFacts:
    return inspect_model(ModelSection(name=str(folder), **section))


def form_of(kind: str, head: bool) -> str:
    return "head" if head else "text" if kind in CAUSAL else "verbalizer"


def batch_of(facts: ModelFacts, length: int = 10) -> Batch:
    """Two rows, the second one padded."""
    tokenizer = load_tokenizer(facts)
    rows = [tokenizer(text)["input_ids"][:n] for text, n in zip(TEXTS, (length, length - 3), strict=True)]
    ids = torch.full((2, length), int(str(tokenizer.pad_token_id)))
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return Batch(ids, mask, torch.arange(2), torch.ones(2))


def load(
    facts: ModelFacts,
    adapter: str,
    form: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    checkpointing: bool = False,
    **section: Any,
) -> torch.nn.Module:
    section = {"rank": 4, "prefix_tokens": 4, **section}
    return load_model(
        facts,
        form=form,
        labels=LABELS if form == "head" else (),
        adapter=AdapterSection(name=adapter, **section),  # pyright: ignore[reportArgumentType]
        device=CPU,
        dtype=dtype,
        seed=seed,
        activation_checkpointing=checkpointing,
        prefix_examples=batch_of(facts) if adapter == "prefix" else None,
    )


def logits_of(model: Any, batch: Batch, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    with autocast(CPU, dtype):
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options).logits


def loss_of(model: Any, batch: Batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Something every weight the model uses has a gradient of."""
    logits = logits_of(model, batch, dtype).float()
    if logits.ndim == 2:
        return torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]))
    targets = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def step(model: torch.nn.Module, batch: Batch, dtype: torch.dtype = torch.float32, lr: float = 1e-2) -> None:
    """One AdamW step, then eval mode."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    torch.manual_seed(0)
    loss_of(model, batch, dtype).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
