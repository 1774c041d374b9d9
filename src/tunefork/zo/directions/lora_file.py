"""What low-rank directions learned, as LoRA factors and as an adapter folder that plain PEFT reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tunefork.zo.directions.base import Directions
from tunefork.zo.directions.low_rank import LowRank
from tunefork.zo.sites import head_names, is_conv1d, output_layer

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def lora_factors(model: torch.nn.Module, parts: Sequence[Directions]) -> Factors:
    """fp32 (A [R, in], B [out, R]) by the name of each linear layer; layers that share a weight each have it."""
    found = {
        place.module: matrix.lora(part.max_rank)
        for part in parts
        if isinstance(part, LowRank)
        for matrix in part.matrices
        for place in matrix.site.places
    }
    return {name: found[module] for name, module in model.named_modules() if module in found}


def no_lora_file(model: torch.nn.Module, parts: Sequence[Directions]) -> str:
    """What keeps that which is learned from being a LoRA file that every reader takes; empty where nothing does."""
    others = [site.name for part in parts if not isinstance(part, LowRank) for site in part.sites]
    if others:
        return f"{', '.join(others[:3])} changed in place"
    if type(model).__module__.startswith("peft."):
        return "a model that PEFT wraps"
    output = output_layer(model)
    ends = [s.name for part in parts for s in part.sites if any(p.module is output for p in s.places)]
    return f"{ends[0]}, the output layer" if ends else ""


def write_adapter(folder: str | Path, model: torch.nn.Module, parts: Sequence[Directions]) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors: LoRA factors in fp32, and a fresh head as a whole.

    Raises ValueError where what was learned does not fit the format.
    """
    factors = lora_factors(model, parts)
    heads = [name for name in head_names(model) if any(n == name or n.startswith(f"{name}.") for n in factors)]
    inside = {n: f for n, f in factors.items() if not any(n == h or n.startswith(f"{h}.") for h in heads)}
    what = no_lora_file(model, parts) or ("" if inside else "a head only")
    if what:
        raise ValueError(f"A LoRA file holds changes of a plain model's linear layers. Received {what}. Try finish().")
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in inside.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
    learned = {site.name: value for part in parts if heads for site, value in _of_heads(part, heads)}
    for head in heads:
        for key, value in model.get_submodule(head).state_dict().items():
            whole = learned.get(f"{head}.{key}", value.detach().float())
            tensors[f"base_model.model.{head}.{key}"] = whole.cpu().clone()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _config(model, inside, heads, next(iter(inside.values()))[0].shape[0])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _of_heads(part: Directions, heads: Sequence[str]) -> list[Any]:
    return [(site, value) for site, value in part.values() if site.name.startswith(tuple(f"{h}." for h in heads))]


def _config(model: torch.nn.Module, factors: Factors, heads: list[str], rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(model.get_submodule(name)) for name in factors),
        "inference_mode": True,
        "target_modules": _targets(model, set(factors)),
        "modules_to_save": heads or None,
    }


def _targets(model: torch.nn.Module, wanted: set[str]) -> list[str]:
    """The layers' last names where those mean these layers and no others, else their full names."""
    ends = {name.rpartition(".")[2] for name in wanted}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if meant == wanted else sorted(wanted)
