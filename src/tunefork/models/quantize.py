"""NF4 weights through bitsandbytes, and the guards they need on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from tunefork.errors import MissingExtraError
from tunefork.models.architecture import block_linears
from tunefork.models.source import safetensors_header, weight_files

_CPU_BLOCK = 32  # out_features that bitsandbytes' CPU kernel counts in


def require_bitsandbytes() -> None:
    """Raises MissingExtraError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "qlora", "A model in 4 bits (NF4)")


def nf4_settings(skipped: Sequence[str], dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 in blocks of 64 with fp32 scales, computing in `dtype` (QLoRA, arXiv 2305.14314, quantised once)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(skipped),
    )


def not_quantized(modules: torch.nn.Module) -> list[str]:
    """Linear layers that stay in 16 or 32 bit: those outside the blocks (output layer, heads, poolers), and any whose
    number of outputs is no multiple of 32, on which bitsandbytes' CPU kernel stops with an assertion."""
    blocks = set(block_linears(modules))
    return [
        name
        for name, module in modules.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and (name not in blocks or _outputs(module) % _CPU_BLOCK)
    ]


def keep_stored_quantization(config: PretrainedConfig, modules: torch.nn.Module, folder: Path) -> None:
    """For a model stored as NF4: makes the config quantise exactly the layers whose file holds a quantisation state.

    Without it a fresh head on such a model is taken for a quantised layer with its weights missing.
    """
    stored = {name for path in weight_files(folder) for name in safetensors_header(path)}
    plain = [
        name
        for name, module in modules.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and f"{name}.weight.quant_state.bitsandbytes__nf4" not in stored
    ]
    settings: Any = getattr(config, "quantization_config", None)
    found = dict(settings) if isinstance(settings, dict) else settings.to_dict()
    setattr(config, "quantization_config", {**found, "llm_int8_skip_modules": plain})  # noqa: B010


def guard_quantized(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Makes NF4 layers compute in `dtype` and never repack their weights.

    bitsandbytes 0.50 repacks them for AVX512-BF16 in the first forward pass in eval mode and, asked for a state
    dict, unpacks them wrongly: every later forward pass, and what is saved, is off by half (bitsandbytes #2078).
    """
    for layer in quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def quantized_layers(model: torch.nn.Module) -> list[Any]:
    """The NF4 layers of a model."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    from bitsandbytes.nn.modules import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _outputs(module: torch.nn.Linear | Conv1D) -> int:
    return module.out_features if isinstance(module, torch.nn.Linear) else int(module.nf)
