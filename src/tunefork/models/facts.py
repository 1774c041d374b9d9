"""What is known of a model before any weight is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from tunefork.errors import UnsupportedError
from tunefork.models.architecture import (
    checked_kind,
    has_head_class,
    has_plain_cache,
    max_positions,
    meta_model,
    natural_kind,
    read_config,
    without_quantization,
)
from tunefork.models.source import Source, find_source, fingerprint, safetensors_header, weight_files
from tunefork.recipe.schema import ModelKind, ModelSection

_DISK_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F64": "fp64"}
_CONFIG_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as its config and the headers of its weights describe it."""

    name: str  # as the user named it
    source: Source
    kind: ModelKind
    architecture: str
    parameters: int  # without a classification head; tied weights counted once
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    max_positions: int
    tied: bool
    dtype_on_disk: str  # fp32, bf16, fp16, fp64
    quantized: bool  # NF4 on disk
    has_head_class: bool  # transformers can put a classification head on it
    has_plain_cache: bool  # keys and values of every layer can be stood for by a prefix
    can_checkpoint: bool  # activations can be recomputed
    trust_remote_code: bool
    revision: str | None
    fingerprint: str

    @property
    def folder(self) -> Path:
        """Config and tokenizer; of a hub model the weights join them when it is loaded."""
        return self.source.folder

    def summary(self) -> dict[str, Any]:
        """The facts as JSON."""
        facts = asdict(self)
        source = facts.pop("source")
        return {**facts, "folder": str(source["folder"]), "commit": source["commit"]}


def inspect_model(section: ModelSection) -> ModelFacts:
    """Facts from config, tokenizer files and weight headers; no weights are read.

    Raises MissingFileError when there is no such model, UnsupportedError when it cannot be used: pickled weights, code
    of its own that is not asked for, an encoder-decoder, a quantisation other than NF4, damaged files.
    """
    source = find_source(section.name, section.revision)
    config = read_config(source.folder, section.trust_remote_code)
    if section.kind == "auto":
        kind, _ = natural_kind(config)
    else:
        kind = checked_kind(config, section.kind)
    quantized = _is_nf4(config)
    modules = meta_model(without_quantization(config), kind, False, section.trust_remote_code)
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    hidden = int(text.hidden_size)
    return ModelFacts(
        name=section.name,
        source=source,
        kind=kind,
        architecture=(config.architectures or [type(modules).__name__])[0],
        parameters=sum(p.numel() for p in modules.parameters()),
        hidden=hidden,
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_size=int(getattr(text, "head_dim", None) or hidden // heads),
        vocab=int(text.vocab_size),
        max_positions=max_positions(config),
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        dtype_on_disk=_dtype_on_disk(source, config),
        quantized=quantized,
        has_head_class=has_head_class(config),
        has_plain_cache=has_plain_cache(config, modules),
        can_checkpoint=modules.supports_gradient_checkpointing,
        trust_remote_code=section.trust_remote_code,
        revision=section.revision,
        fingerprint=fingerprint(source),
    )


def _is_nf4(config: PretrainedConfig) -> bool:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    found: Mapping[str, Any] = settings if isinstance(settings, Mapping) else settings.to_dict()
    if found.get("load_in_4bit") and found.get("bnb_4bit_quant_type") == "nf4":
        return True
    raise UnsupportedError(
        "A quantised model must be stored as NF4 by bitsandbytes. Received the quantisation "
        f"{found.get('quant_method', 'of an unknown kind')!r}. Try the original model; adapter qlora quantises it."
    )


def _dtype_on_disk(source: Source, config: PretrainedConfig) -> str:
    """The format most weights are stored in; of a hub model not yet fetched, what its config says."""
    sizes: Counter[str] = Counter()
    for path in weight_files(source.folder):
        for tensor in safetensors_header(path).values():
            if tensor["dtype"] in _DISK_DTYPES:
                sizes[_DISK_DTYPES[tensor["dtype"]]] += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    if sizes:
        return sizes.most_common(1)[0][0]
    return _CONFIG_DTYPES.get(str(config.dtype).removeprefix("torch."), "fp32")
