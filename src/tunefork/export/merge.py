"""A trained model as plain weights: dequantised, merged in fp32, saved as transformers saves any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from tunefork.models import bare_model, quantized_layers, quiet  # isort: skip  # before peft, which imports bitsandbytes
from peft import PeftModel
from transformers import PreTrainedModel

from tunefork.errors import ExportError, UnsupportedError
from tunefork.evaluate.trained import Trained
from tunefork.models.architecture import auto_class
from tunefork.models.artefact import generation_settings, save_whole
from tunefork.models.facts import ModelFacts


def merged_model(trained: Trained, adapter_folder: Path) -> PreTrainedModel:
    """The trained model without an adapter, in fp32. `trained` is used up: its base becomes the merged model.

    LoRA under NF4 is merged into the dequantised base, which is what it was trained on: into the original weights, or
    quantised again, the result is off by a quarter of what was learned.
    Raises ExportError where the merged weights are not finite.
    """
    model = trained.model
    if not isinstance(model, PeftModel):
        bare = bare_model(model)
        assert isinstance(bare, PreTrainedModel)
        return bare.float()
    with quiet():
        base: Any = model.unload()
        if quantized_layers(base):
            base.config.dtype = torch.float32  # of the result; a base stored as NF4 names another
            base = base.dequantize()
        wrapped = PeftModel.from_pretrained(base.float(), str(adapter_folder))
        try:
            merged = wrapped.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ExportError(f"Merged weights must be finite. Received: {error}. Try --to adapter.") from error
    if not isinstance(merged, PreTrainedModel):
        raise UnsupportedError(f"A merge gives a transformers model. Received {type(merged).__name__}.")
    return merged.float()


def save_plain(
    model: PreTrainedModel,
    trained: Trained,
    base_folder: Path,
    folder: Path,
    dtype: torch.dtype,
    *,
    was_quantized: bool,
) -> None:
    """Model in `dtype`, tokenizer with its chat template, and generation settings, as plain transformers reads them.

    Generation ends at what ended an answer in training, besides what ended it for the base.
    """
    cast(torch.nn.Module, model).to(dtype)
    settings = _generation_settings(model, trained, base_folder) if model.can_generate() else None
    # the way from names and layout on the disk to those in memory cannot be gone back where it quantised
    save_whole(model, base_folder, folder, dtype, settings, save_original_format=not was_quantized)
    with quiet():
        trained.tokenizer.save_pretrained(folder)


def load_plain(
    folder: Path, facts: ModelFacts, head: bool, device: torch.device, dtype: torch.dtype | str
) -> torch.nn.Module:
    """What plain transformers loads from a folder; `dtype` "auto" is the one its config names."""
    with quiet():
        model: torch.nn.Module = auto_class(facts.kind, head).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=facts.trust_remote_code
        )
    return model.to(device).requires_grad_(False).eval()


def _generation_settings(model: PreTrainedModel, trained: Trained, base_folder: Path) -> dict[str, Any]:
    settings = generation_settings(model, base_folder)
    known = settings.get("eos_token_id")
    ends = [*trained.renderer.stop_ids, *(known if isinstance(known, list) else [] if known is None else [known])]
    ends = list(dict.fromkeys(ends))
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    settings["pad_token_id"] = trained.tokenizer.pad_token_id
    return settings
