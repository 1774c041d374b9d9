"""Loads tokenizers, and models without an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunefork.errors import UnsupportedError
from tunefork.models.architecture import auto_class, meta_model, read_config, without_quantization
from tunefork.models.facts import ModelFacts
from tunefork.models.quantize import (
    guard_quantized,
    keep_stored_quantization,
    nf4_settings,
    not_quantized,
    require_bitsandbytes,
)
from tunefork.models.quiet import quiet
from tunefork.models.source import with_weights
from tunefork.models.support import Form, check_support

_PAD_HINTS = ("pad", "reserved", "unused")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A transformers model and, with a classification head, the modules that make up the head."""

    model: PreTrainedModel
    head: tuple[str, ...] = ()


def load_tokenizer(facts: ModelFacts) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token that is another than its end token wherever it has one to spare.

    Padding is known by the attention mask alone: no loss or score ever looks at the pad id, so an end token is trained
    even where it must serve as pad (tokenizers without any other special token, such as GPT-2's).
    Raises UnsupportedError when the files cannot be read.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(facts.folder, trust_remote_code=facts.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedError(
            f"A model must come with a tokenizer transformers can read. Received {facts.name!r}: "
            f"{' '.join(str(error).split())[:200]} Try downloading the tokenizer files of the original model."
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not set(tokenizer.get_vocab()) - {
        token.content for token in tokenizer.added_tokens_decoder.values()
    }:  # for want of files, transformers makes one up that knows special tokens only
        raise UnsupportedError(
            f"A model must come with a tokenizer. Received {facts.name!r} without one. "
            "Try downloading the tokenizer files of the original model."
        )
    pad = cast("int | None", tokenizer.pad_token_id)
    if pad is None or pad == tokenizer.eos_token_id or pad >= facts.vocab:
        tokenizer.pad_token = _spare_token(tokenizer, facts.vocab)
    tokenizer.padding_side = "right"
    return tokenizer


def has_trained_head(facts: ModelFacts, labels: Sequence[str]) -> bool:
    """Whether the checkpoint comes with a classification head for these labels, which is then kept."""
    return _has_trained_head(read_config(facts.folder, facts.trust_remote_code), labels)


def load_base(
    facts: ModelFacts,
    form: Form,
    labels: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    nf4: bool = False,
) -> PreTrainedModel:
    """The model as it is, frozen, in eval mode and in `dtype` (run it inside `autocast`); with `nf4`, quantised.

    With form head it has the head it was stored with if that has these labels, otherwise a fresh one (seed 0).
    """
    check_support(facts, "qlora" if facts.quantized else "lora", form, "evaluation")
    loaded = load_transformers(facts, form=form, labels=labels, device=device, dtype=dtype, nf4=nf4, seed=0)
    return loaded.model.requires_grad_(False).eval()


def load_transformers(
    facts: ModelFacts,
    *,
    form: Form,
    labels: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    nf4: bool,
    seed: int,
) -> Loaded:
    """The model with all weights in `dtype` (fresh head weights too) or, with `nf4`, its blocks quantised.

    Weights of the head that the checkpoint lacks are a function of `seed` alone; the global random state is left as
    it was. Raises UnsupportedError when other weights are missing or a file is damaged.
    """
    head = form == "head"
    config = read_config(facts.folder, facts.trust_remote_code)
    keeps_head = head and _has_trained_head(config, labels)
    if head:
        _set_labels(config, labels)
        if facts.kind == "causal":  # its head reads the last token that is not the pad token, which must be ours
            config.pad_token_id = cast(int, load_tokenizer(facts).pad_token_id)
    folder = with_weights(facts.source)
    options: dict[str, Any] = {}
    if nf4 or facts.quantized:
        require_bitsandbytes()
        options["device_map"] = {"": str(device)}
        modules = meta_model(without_quantization(config), facts.kind, head, facts.trust_remote_code)
        if facts.quantized:
            keep_stored_quantization(config, modules, folder)
        else:
            options["quantization_config"] = nf4_settings(not_quantized(modules), dtype)
    try:
        with quiet(), own_randomness(device, seed):
            model, report = auto_class(facts.kind, head).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=head,
                output_loading_info=True,
                trust_remote_code=facts.trust_remote_code,
                **options,
            )
    except SafetensorError as error:
        raise UnsupportedError(
            f"Weights must be whole safetensors files. Received {facts.name!r}: {error}. Try downloading it again."
        ) from None
    model = cast(PreTrainedModel, model if options else model.to(device))
    lacking = {*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])}
    guard_quantized(model, dtype)
    if not head:
        if lacking:
            raise UnsupportedError(
                f"A checkpoint must hold all weights of {type(model).__name__}. Received {facts.name!r} without "
                f"{', '.join(sorted(lacking)[:3])}. Try another `model.kind`, or downloading it again."
            )
        return Loaded(model)
    fresh = lacking if keeps_head else lacking | _head_parameters(model)
    _draw(model, fresh, seed)
    return Loaded(model, _head_modules(model, lacking))


@contextlib.contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """A block that draws from a generator seeded with `seed`; the global one goes on afterwards as if nothing was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _spare_token(tokenizer: PreTrainedTokenizerBase, vocab: int) -> str:
    """A token to pad with that the model has an embedding for; the end token only where there is no other."""
    end, start, unknown = (
        cast("str | None", t) for t in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    )
    special = [token.content for i, token in sorted(tokenizer.added_tokens_decoder.items()) if i < vocab]
    spare = [t for t in special if t not in (end, start) and any(hint in t.lower() for hint in _PAD_HINTS)]
    last = [t for t in (unknown, end) if t is not None]
    if unknown in (end, start):
        last.reverse()
    if not spare and not last:
        raise UnsupportedError(
            "A tokenizer must have a pad, end or unknown token to fill short rows with. Received one without any. "
            "Try setting `pad_token` in its tokenizer_config.json."
        )
    return [*spare, *last][0]


def _has_trained_head(config: PretrainedConfig, labels: Sequence[str]) -> bool:
    """Whether the checkpoint's own head is for these labels: by name, or by number where it has no names."""
    if not (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        return False
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    return names == list(labels) or names == [f"LABEL_{i}" for i in range(len(labels))]


def _set_labels(config: PretrainedConfig, labels: Sequence[str]) -> None:
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise UnsupportedError(
            f"A classification head needs at least two labels, each named once. Received {list(labels)}. "
            "Try `data.labels`, or another label column."
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}


def _head_parameters(model: PreTrainedModel) -> set[str]:
    prefix = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}


def _head_modules(model: PreTrainedModel, lacking: set[str]) -> tuple[str, ...]:
    """Modules beside the backbone, and those inside it the checkpoint lacks (BERT's pooler after masked training)."""
    beside = _head_parameters(model)
    tops = {name.split(".")[0] for name in beside}
    return tuple(sorted(tops | {name.rpartition(".")[0] for name in lacking - beside}))


def _draw(model: PreTrainedModel, names: set[str], seed: int) -> None:
    """Fresh weights: matrices normal with the config's deviation, biases 0, norms 1. The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    text = model.config.get_text_config()
    deviation = float(getattr(text, "initializer_range", None) or getattr(text, "init_std", None) or 0.02)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(names):
            parameter = parameters[name]
            if parameter.ndim >= 2:
                drawn = torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)
                parameter.copy_(drawn)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
