"""Loads a model ready to be trained: the right weights require gradients, in fp32, the rest is frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunefork.batch import Batch
from tunefork.models.adapters import (
    add_lora,
    add_prefix,
    lora_targets,
    recompute_activations,
    train_everything,
    train_head,
)
from tunefork.models.architecture import meta_model, read_config, without_quantization
from tunefork.models.base import load_transformers
from tunefork.models.facts import ModelFacts
from tunefork.models.support import Form, check_support
from tunefork.recipe.schema import AdapterSection


def adapter_targets(facts: ModelFacts, form: Form, wanted: Sequence[str] | str = "auto") -> list[str]:
    """Names of the layers that LoRA is put beside; see `lora_targets`. No weights are read."""
    config = without_quantization(read_config(facts.folder, facts.trust_remote_code))
    return lora_targets(meta_model(config, facts.kind, form == "head", facts.trust_remote_code), wanted)


def load_model(
    facts: ModelFacts,
    *,
    form: Form,
    labels: Sequence[str],
    adapter: AdapterSection,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    activation_checkpointing: bool,
    prefix_examples: Batch | None,
    frozen: bool = False,
) -> torch.nn.Module:
    """The model with its adapter, on `device`. `adapter.name` must not be `auto` any more.

    Frozen weights are in `dtype` (NF4 for qlora). Everything that is trained is fp32, so that no update is rounded
    away: adapters, heads and, with adapter none, the whole model, which computes in `dtype` inside `autocast`.
    Fresh weights are a function of `seed`; the global random state is not touched. With `frozen` the base stays
    as it is, without an adapter, and only a fresh head requires gradients: what is learned lies beside it.

    Raises UnsupportedError, RecipeError or MissingExtraError before weights are read where the combination cannot be.
    """
    name = adapter.name
    if name == "auto":
        raise ValueError("adapter.name must be resolved before a model is loaded")
    check_support(facts, name, form, "training", activation_checkpointing=activation_checkpointing)
    targets: list[str] = []
    if name in ("lora", "qlora", "dora") and not frozen:
        targets = adapter_targets(facts, form, adapter.targets or "auto")
    loaded = load_transformers(
        facts,
        form=form,
        labels=labels,
        device=device,
        dtype=torch.float32 if name == "none" and not frozen else dtype,
        nf4=name == "qlora",
        seed=seed,
    )
    if frozen:
        loaded.model.requires_grad_(False)
        for module in loaded.head:
            loaded.model.get_submodule(module).requires_grad_(True)
        return loaded.model
    if name == "none":
        model = train_everything(loaded)
    elif name == "head":
        model = train_head(loaded)
    elif name == "prefix":
        model = add_prefix(loaded, facts, adapter, prefix_examples, dtype, seed)
    else:
        model = add_lora(loaded, facts, adapter, targets, seed)
    if activation_checkpointing:
        recompute_activations(model)
    return model
