"""What a config says: which class it is, what it can do, and its shape on the meta device, without a weight loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from tunefork.errors import UnsupportedError
from tunefork.models.quiet import quiet
from tunefork.recipe.schema import ModelKind

_AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "encoder": AutoModel}
NO_LIMIT = 1 << 20  # positions of models that name no limit


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a model folder. Raises UnsupportedError when it cannot be read, or wants code of its own."""
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise UnsupportedError(
                f"A model must be one transformers knows. Received {str(folder)!r}, which brings code of its own. "
                "Try --set model.trust_remote_code=true once you have read that code."
            ) from None
        raise UnsupportedError(
            f"config.json must be one transformers can read. Received {str(folder)!r}: {text[:240]} "
            "Try a newer transformers, or another model."
        ) from None


def auto_class(kind: ModelKind, head: bool) -> Any:
    """The transformers class that loads this kind of model, with a classification head or its own."""
    return AutoModelForSequenceClassification if head else _AUTO[kind]


def natural_kind(config: PretrainedConfig) -> tuple[ModelKind, str]:
    """The kind and what in the config says so. Raises UnsupportedError for models with both encoder and decoder."""
    named = (config.architectures or [""])[0]
    if config.is_encoder_decoder:
        raise UnsupportedError(
            f"A model must be a causal, masked or encoder one. Received {named or config.model_type}, which has both "
            "an encoder and a decoder. Try a causal model."
        )
    why = f"its config says {named}" if named else f"its config says model_type {config.model_type}"
    if _knows(config, "masked"):
        masked = named.endswith(("ForMaskedLM", "ForPreTraining", "WithLMHeadModel"))
        return ("masked" if masked else "encoder"), why
    if _knows(config, "causal"):
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        bare = named.endswith("Model") and not named.endswith("LMHeadModel") and not tied
        return ("encoder" if bare and _knows(config, "encoder") else "causal"), why
    if getattr(config.get_text_config(), "vocab_size", None) is None or not _knows(config, "encoder"):
        raise UnsupportedError(
            f"A model must be a language model. Received {named or config.model_type}. Try a causal or masked one."
        )
    return "encoder", why


def checked_kind(config: PretrainedConfig, asked: ModelKind) -> ModelKind:
    """`asked`, if this architecture can be used so. Raises UnsupportedError otherwise."""
    natural, why = natural_kind(config)
    reads_both_ways = _knows(config, "masked")
    wrong = (asked == "causal" and (reads_both_ways or not _knows(config, "causal"))) or (
        asked == "masked" and not reads_both_ways
    )
    if wrong:
        raise UnsupportedError(
            f"`model.kind` must be one the architecture can be. Received {asked}, but {why}. Try {natural} or auto."
        )
    return asked


def meta_model(config: PretrainedConfig, kind: ModelKind, head: bool, trust_remote_code: bool) -> PreTrainedModel:
    """The model's modules on the meta device: names, shapes and signatures, no memory."""
    with quiet(), torch.device("meta"):
        return auto_class(kind, head).from_config(config, trust_remote_code=trust_remote_code)


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """A copy that describes the same model in plain weights."""
    plain = type(config).from_dict(config.to_dict())
    plain.__dict__.pop("quantization_config", None)
    return plain


def has_head_class(config: PretrainedConfig) -> bool:
    """Whether transformers has this architecture with a classification head."""
    return _mapped(config, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "AutoModelForSequenceClassification")


def has_plain_cache(config: PretrainedConfig, model: PreTrainedModel) -> bool:
    """Whether every layer keeps keys and values that a learned prefix can stand for (no state space, no latents)."""
    if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        return False
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_kv_shared_layers", "kv_lora_rank")):
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=text).layers)


def max_positions(config: PretrainedConfig) -> int:
    """Longest sequence the position embeddings allow, in tokens; NO_LIMIT where the config names none."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
    found = next((int(v) for name in names if isinstance(v := getattr(text, name, None), int) and v > 0), NO_LIMIT)
    offset = config.pad_token_id if _pads_positions(config) else None
    return found if offset is None else found - int(offset) - 1


def block_linears(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers in the repeated blocks: those under a numbered module (`layers.0.mlp.up_proj`)."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split("."))
    ]


def _pads_positions(config: PretrainedConfig) -> bool:
    """RoBERTa and its kin count positions from `pad_token_id + 1`, so as many are lost."""
    lost = ("roberta", "camembert", "xlm-roberta", "longformer", "data2vec-text", "xmod", "ibert", "mpnet", "esm")
    return config.model_type in lost or config.model_type.startswith(("roberta", "xlm-roberta"))


def _knows(config: PretrainedConfig, kind: ModelKind) -> bool:
    """Whether the architecture has a class of this kind, in transformers or in code of its own."""
    mapping, name = {
        "causal": (MODEL_FOR_CAUSAL_LM_MAPPING, "AutoModelForCausalLM"),
        "masked": (MODEL_FOR_MASKED_LM_MAPPING, "AutoModelForMaskedLM"),
        "encoder": (MODEL_MAPPING, "AutoModel"),
    }[kind]
    return _mapped(config, mapping, name)


def _mapped(config: PretrainedConfig, mapping: Any, name: str) -> bool:
    own: dict[str, str] = getattr(config, "auto_map", None) or {}
    return type(config) in mapping or name in own
