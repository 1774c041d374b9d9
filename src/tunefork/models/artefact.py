"""What training leaves behind: a folder that plain PEFT or plain transformers loads, and that explains itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunefork.errors import MissingFileError, RunError, UnsupportedError
from tunefork.models.adapters import bare_model, wrap
from tunefork.models.base import Loaded, load_tokenizer, load_transformers
from tunefork.models.facts import ModelFacts, inspect_model
from tunefork.models.quantize import quantized_layers
from tunefork.models.quiet import quiet
from tunefork.models.source import read_json
from tunefork.recipe.schema import AdapterName, ModelSection

SCHEMA = 1
INFO_FILE = "tunefork.json"
ADAPTER_FILE = "adapter_model.safetensors"


class ArtefactInfo(TypedDict):
    """tunefork.json. `extra` is the caller's: task, labels, rendering …"""

    schema: int
    adapter: AdapterName
    head: bool
    labels: list[str]  # of the classification head
    trained: list[str]  # parameters that were trained, fp32; empty for full training and PEFT adapters
    base: dict[str, Any]  # ModelFacts.summary() of the model that was trained
    extra: dict[str, Any]


def save_artefact(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    facts: ModelFacts,
    folder: Path | str,
    extra: Mapping[str, Any],
) -> None:
    """Writes the trained model, its tokenizer and tunefork.json into `folder`, as safetensors and JSON.

    An adapter becomes a PEFT folder that names its base by hub name or absolute path; full training and heads become a
    transformers folder, whose config says fp32 so that no loader rounds what was trained. Not atomic: write into a
    folder beside and rename. `extra` must be JSON. Raises RunError when nothing in the model is trained.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bare = bare_model(model)
    if not isinstance(bare, PreTrainedModel):
        raise RunError(f"An artefact is made of a transformers model. Received {type(bare).__name__}.")
    adapter = _adapter_of(model, facts)
    head = type(bare).__name__.endswith("ForSequenceClassification")
    trained = sorted(n for n, p in model.named_parameters() if p.requires_grad) if adapter == "head" else []
    info: ArtefactInfo = {
        "schema": SCHEMA,
        "adapter": adapter,
        "head": head,
        "labels": [str(name) for _, name in sorted((bare.config.id2label or {}).items())] if head else [],
        "trained": trained,
        "base": facts.summary(),
        "extra": dict(extra),
    }
    text = json.dumps(info, ensure_ascii=False, indent=2, allow_nan=False)
    with quiet():
        if isinstance(model, PeftModel):
            _save_adapter(model, facts, folder)
        else:
            save_whole(bare, facts.folder, folder, torch.float32)
        tokenizer.save_pretrained(folder)
    (folder / INFO_FILE).write_text(text + "\n", encoding="utf-8")


def read_artefact_info(folder: Path | str) -> ArtefactInfo:
    """tunefork.json of a folder. Raises MissingFileError without one, RunError when it is of another schema."""
    path = Path(folder) / INFO_FILE
    if not path.is_file():
        raise MissingFileError(
            f"A trained model's folder must hold {INFO_FILE}. Received {str(folder)!r} without it. "
            "Try a run's folder, or its `model` folder."
        )
    info = read_json(path)
    if info.get("schema") != SCHEMA:
        raise RunError(
            f"{str(path)!r} must be of schema {SCHEMA}. Received {info.get('schema')!r}. "
            "Try the version of Tunefork that wrote it."
        )
    return info  # pyright: ignore[reportReturnType]


def load_artefact(
    folder: Path | str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, ModelFacts]:
    """The model as it was when saved: in eval mode, frozen, with logits bitwise those of then (same device, `dtype`,
    inside `autocast`). `base` says where the model under an adapter is now, if it has moved.

    Raises MissingFileError when the folder or its base is not there, RunError when the base is not the one the adapter
    was trained on, UnsupportedError when it wants code of its own and that is not asked for.
    """
    folder, info = Path(folder), read_artefact_info(folder)
    whole = info["adapter"] in ("none", "head")
    if whole:
        known = info["base"]
        _refuse_code(known, trust_remote_code)
        section = ModelSection(name=str(folder), kind=known["kind"], trust_remote_code=known["trust_remote_code"])
        facts = inspect_model(section)
    else:
        facts = base_facts(info["base"], base, trust_remote_code=trust_remote_code)
    loaded = load_transformers(
        facts,
        form="head" if info["head"] else "text",
        labels=info["labels"],
        device=device,
        dtype=torch.float32 if whole else dtype,
        nf4=info["adapter"] == "qlora",
        seed=0,
    )
    model = _restored_head(loaded, info, dtype) if whole else add_adapter(loaded.model, folder)
    tokenizer = load_tokenizer(facts) if whole else artefact_tokenizer(folder, facts.trust_remote_code)
    return model.requires_grad_(False).eval(), tokenizer, facts


def _adapter_of(model: torch.nn.Module, facts: ModelFacts) -> AdapterName:
    if isinstance(model, PeftModel):
        config: Any = model.active_peft_config
        if config.is_prompt_learning:
            return "prefix"
        if config.use_dora:
            return "dora"
        return "qlora" if quantized_layers(model) and not facts.quantized else "lora"
    trained = [p.requires_grad for p in model.parameters()]
    if not any(trained):
        raise RunError("An artefact holds what was trained. Received a model without a trained weight.")
    return "none" if all(trained) else "head"


def _save_adapter(model: PeftModel, facts: ModelFacts, folder: Path) -> None:
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / ADAPTER_FILE, {"format": "pt"})
    config = copy.copy(model.active_peft_config)
    config.base_model_name_or_path = facts.source.hub_name or str(facts.folder)
    config.revision = facts.revision
    config.inference_mode = True
    if config.task_type is None:  # how PEFT finds the class of a model it has no task type for
        bare = type(model.get_base_model())
        config.auto_mapping = {"base_model_class": bare.__name__, "parent_library": bare.__module__}
    config.save_pretrained(str(folder))


def generation_settings(model: PreTrainedModel, base_folder: Path) -> dict[str, Any]:
    """What the base's generation_config.json says, or else its config."""
    path = base_folder / "generation_config.json"
    return read_json(path) if path.is_file() else GenerationConfig.from_model_config(model.config).to_diff_dict()


def save_whole(
    model: PreTrainedModel,
    base_folder: Path,
    folder: Path,
    dtype: torch.dtype,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """save_pretrained, then repairs in what it wrote: number format, use of the cache, and generation `settings`.

    transformers refuses to save generation settings it finds inconsistent (which many published models have), after
    training and with nothing written; they are written as they are instead (`generation_settings` when absent).
    """
    own = model.generation_config if model.can_generate() else None
    if own is not None:
        settings = generation_settings(model, base_folder) if settings is None else settings
        model.generation_config = GenerationConfig()
    with quiet():
        model.save_pretrained(folder, **options)
    if own is not None:
        model.generation_config = own
    config, base = read_json(folder / "config.json"), read_json(base_folder / "config.json")
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("use_cache", None)  # activation checkpointing turns it off
    if "use_cache" in base:
        config["use_cache"] = base["use_cache"]
    for name, content in (("config.json", config), ("generation_config.json", settings)):
        if content is not None:
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def base_facts(known: Mapping[str, Any], base: str | None = None, *, trust_remote_code: bool = False) -> ModelFacts:
    """Facts of the model that was trained, `known` as `ModelFacts.summary` gave them: where `base` says, else by its
    name then, else where it was then.

    Raises MissingFileError when it is not there, RunError when it is not the same any more, UnsupportedError when it
    brings code of its own: whether that may run is for the caller to say, never for the file that `known` is from.
    """
    _refuse_code(known, trust_remote_code)
    section = ModelSection(
        name=base or known["name"],
        kind=known["kind"],
        revision=None if base else known["commit"] or known["revision"],
        trust_remote_code=known["trust_remote_code"],
    )
    try:
        facts = inspect_model(section)
    except MissingFileError:
        if base is not None or not Path(known["folder"]).is_dir():
            raise
        facts = inspect_model(section.model_copy(update={"name": known["folder"], "revision": None}))
    if facts.fingerprint != known["fingerprint"] and facts.source.commit == known["commit"]:
        raise RunError(
            f"What was learned needs the model it was trained on. Received {facts.name!r}, which has changed since or "
            "is another. Try the original model."
        )
    return replace(facts, name=known["name"])


def _refuse_code(known: Mapping[str, Any], trusted: bool) -> None:
    if known["trust_remote_code"] and not trusted:
        raise UnsupportedError(
            f"A model's own Python code runs only where that is asked for. {known['name']!r} brings some. "
            "Try --trust-remote-code (in Python trust_remote_code=True) once you have read it."
        )


def add_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """The model with an artefact's adapter under `name`, beside those it has already. Its own weights are not touched.

    Raises RunError where the weights are damaged, or not those that adapter_config.json describes.
    """
    try:
        stored = load_file(folder / ADAPTER_FILE, device=str(model.device))
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{str(folder / ADAPTER_FILE)!r} must be a whole safetensors file. Received: {error}. Try a copy of it."
        ) from None
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    if isinstance(model, PeftModel):
        with quiet():
            model.add_adapter(name, config)
    else:
        model = wrap(model, config, seed=0, name=name)
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    if shapes != {key: tuple(tensor.shape) for key, tensor in stored.items()}:
        raise RunError(f"{str(folder)!r} must hold the weights its adapter_config.json describes. Received others.")
    set_peft_model_state_dict(model, stored, adapter_name=name)
    return model


def artefact_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that was kept with an adapter. Raises MissingFileError where there is none."""
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise MissingFileError(f"An adapter's folder must hold its tokenizer. Received {str(folder)!r} without one.")
    return tokenizer


def _restored_head(loaded: Loaded, info: ArtefactInfo, dtype: torch.dtype) -> torch.nn.Module:
    """Full training stays in fp32; under a trained head the frozen weights go back to `dtype`."""
    if info["adapter"] == "head":
        trained = set(info["trained"])
        for name, parameter in loaded.model.named_parameters():
            if name not in trained and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return loaded.model
