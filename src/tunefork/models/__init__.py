"""Models: facts before loading, loading with an adapter, and what is kept after training."""

from tunefork.models import guard  # isort: skip  # first: peft, imported below, imports bitsandbytes
from tunefork.models.adapters import add_factors, bare_model, has_learned_prefix
from tunefork.models.artefact import (
    ArtefactInfo,
    add_adapter,
    artefact_tokenizer,
    load_artefact,
    read_artefact_info,
    save_artefact,
)
from tunefork.models.base import load_base, load_tokenizer
from tunefork.models.device import autocast, choose_device, choose_dtype, torch_dtype
from tunefork.models.facts import ModelFacts, inspect_model
from tunefork.models.load import adapter_targets, load_model
from tunefork.models.quantize import quantized_layers
from tunefork.models.quiet import quiet
from tunefork.models.state import load_trainable_state, trainable_state
from tunefork.models.support import check_support, usable_positions

__all__ = [
    "ArtefactInfo",
    "ModelFacts",
    "adapter_targets",
    "add_adapter",
    "add_factors",
    "artefact_tokenizer",
    "autocast",
    "bare_model",
    "check_support",
    "choose_device",
    "choose_dtype",
    "guard",
    "has_learned_prefix",
    "inspect_model",
    "load_artefact",
    "load_base",
    "load_model",
    "load_tokenizer",
    "load_trainable_state",
    "quantized_layers",
    "quiet",
    "read_artefact_info",
    "save_artefact",
    "torch_dtype",
    "trainable_state",
    "usable_positions",
]
