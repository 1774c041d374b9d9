"""Puts an adapter on a model: which weights are trained, and where they start."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunefork.batch import Batch
from tunefork.errors import RecipeError, UnsupportedError, did_you_mean
from tunefork.models.architecture import block_linears
from tunefork.models.base import Loaded, own_randomness
from tunefork.models.device import autocast
from tunefork.models.facts import ModelFacts
from tunefork.models.quiet import quiet
from tunefork.recipe.schema import AdapterSection

_log = logging.getLogger(__name__)


def bare_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_learned_prefix(model: torch.nn.Module) -> bool:
    """Whether PEFT puts learned keys and values into the model's cache."""
    return isinstance(model, PeftModel) and any(c.is_prompt_learning for c in model.peft_config.values())


def train_everything(loaded: Loaded) -> torch.nn.Module:
    """Full training. The model must be in fp32: AdamW's updates are lost when rounded to 16 bit."""
    return loaded.model.requires_grad_(True)


def train_head(loaded: Loaded) -> torch.nn.Module:
    """Only the classification head is trained, in fp32."""
    loaded.model.requires_grad_(False)
    for name in loaded.head:
        loaded.model.get_submodule(name).float().requires_grad_(True)
    return loaded.model


def lora_targets(modules: torch.nn.Module, wanted: Sequence[str] | str) -> list[str]:
    """The shortest names that mean the wanted layers and no others; `auto`: every linear layer in the blocks.

    A name means every layer it is the end of (`q_proj`, `self_attn.q_proj`). Raises RecipeError for names that mean
    no linear layer, UnsupportedError when there is none in any block.
    """
    linears = [n for n, m in modules.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    if wanted != "auto":
        known = sorted({name.rpartition(".")[2] for name in linears})
        for name in wanted:
            if not any(_ends(linear, name) for linear in linears):
                raise RecipeError(
                    f"`adapter.targets` must name linear layers of the model. Received {name!r}."
                    f"{did_you_mean(name, known)} It has {', '.join(known)}."
                )
        return list(wanted)
    blocks = set(block_linears(modules))
    if not blocks:
        raise UnsupportedError(
            f"LoRA needs linear layers in the model's blocks. Received {type(modules).__name__} without any. "
            "Try --adapter none."
        )
    for parts in range(1, 8):
        names = sorted({_tail(name, parts) for name in blocks})
        if {linear for linear in linears if any(_ends(linear, name) for name in names)} == blocks:
            return names
    return sorted(blocks)


def add_lora(
    loaded: Loaded, facts: ModelFacts, adapter: AdapterSection, targets: Sequence[str], seed: int
) -> PeftModel:
    """LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353) in fp32 on a frozen model: A drawn from `seed`, B zero."""
    conv = any(isinstance(m, Conv1D) and any(_ends(n, t) for t in targets) for n, m in loaded.model.named_modules())
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha if isinstance(adapter.alpha, float) else 2 * adapter.rank,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        target_modules=list(targets),
        use_dora=adapter.name == "dora",
        fan_in_fan_out=conv,
        task_type=_task_type(loaded, facts),
        modules_to_save=list(loaded.head) or None,
    )
    return wrap(loaded.model, config, seed)


def add_factors(
    model: PreTrainedModel, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], rank: int
) -> PeftModel:
    """A frozen model with changes B A [out, in] of its linear layers, given as (A [r, in], B [out, r]) by layer name.

    Layers of the blocks get them as LoRA of rank r = `rank`, those of a head as weights of its own, which PEFT keeps.
    """
    backbone = f"{model.base_model_prefix}."
    head = sorted({n.partition(".")[0] for n, _ in model.named_parameters() if not n.startswith(backbone)})
    if not type(model).__name__.endswith("ForSequenceClassification"):
        head = []
    inside = [name for name in factors if name.partition(".")[0] not in head]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=inside,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in inside),
        task_type=TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM if model.can_generate() else None,
        modules_to_save=head or None,
    )
    wrapped = wrap(model, config, 0)
    bare = wrapped.get_base_model()
    with torch.no_grad():
        for name, (a, b) in factors.items():
            if name in inside:
                layer: Any = bare.get_submodule(name)
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
            else:
                top, _, rest = name.partition(".")
                kept: Any = bare.get_submodule(top)
                weight = kept.modules_to_save["default"].get_submodule(rest).weight
                for k in range(rank):  # not one product, whose order of sums depends on the machine
                    weight.add_(torch.outer(b[:, k].float(), a[k].float()))
    return wrapped


def add_prefix(
    loaded: Loaded, facts: ModelFacts, adapter: AdapterSection, examples: Batch | None, dtype: torch.dtype, seed: int
) -> PeftModel:
    """A prefix (arXiv 2101.00190) of `prefix_tokens` keys and values a layer, fp32, on a frozen model.

    It starts as what the model itself keeps of real tokens, the first ones of `examples` (MeZO, arXiv 2305.17333,
    appendix E.5, found that essential); without examples, of random tokens. For causal models it is then proven that
    the prefix does what showing those tokens does. Raises UnsupportedError where it does not.
    """
    model, length = loaded.model, adapter.prefix_tokens
    tokens = _prefix_tokens(facts, examples, length, seed).to(model.device)
    cache = _kept(model, tokens, dtype)
    heads, size = cache[0].shape[1], cache[0].shape[3]
    if any(t.shape != (1, heads, length, size) for t in cache):
        raise UnsupportedError(
            f"A prefix needs layers that all keep {length} keys of one shape. Received {facts.architecture}, with "
            f"{sorted({tuple(t.shape[1:]) for t in cache})}. Try fewer `adapter.prefix_tokens`, or --adapter lora."
        )
    shown = _shown(model, tokens, dtype) if facts.kind == "causal" else None
    config = PrefixTuningConfig(
        num_virtual_tokens=length,
        num_layers=len(cache) // 2,
        num_attention_heads=heads,
        token_dim=heads * size,
        task_type=_task_type(loaded, facts),
    )
    if loaded.head:
        config.modules_to_save = list(loaded.head)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped = wrap(model, config, seed)
    weight = wrapped.prompt_encoder["default"].get_submodule("embedding").get_parameter("weight")
    with torch.no_grad():  # [prefix, layers x (key, value) x heads x size], as PEFT unfolds it
        weight.copy_(torch.cat([t[0].transpose(0, 1).reshape(length, heads * size) for t in cache], dim=1))
    if shown is not None:
        _prove(wrapped, tokens, shown, dtype, facts)
    return wrapped


def wrap(model: PreTrainedModel, config: PeftConfig, seed: int, name: str = "default") -> PeftModel:
    """The model under PEFT with everything that is trained in fp32, drawn from `seed`."""
    with quiet(), own_randomness(model.device, seed):
        wrapped = get_peft_model(model, config, adapter_name=name)
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    if not isinstance(wrapped, PeftModel):
        raise UnsupportedError(f"PEFT must know the adapter. Received {config.peft_type}. Try --adapter lora.")
    return wrapped


def recompute_activations(model: torch.nn.Module) -> None:
    """Activation checkpointing, the variant that needs no gradient at the blocks' input, so frozen bases work."""
    bare = bare_model(model)
    if isinstance(bare, PreTrainedModel):
        with quiet():
            bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        bare.config.use_cache = False  # otherwise every block says that it does without


def _task_type(loaded: Loaded, facts: ModelFacts) -> TaskType | None:
    """PEFT has no task type for masked models; it wraps them as they are."""
    return TaskType.SEQ_CLS if loaded.head else TaskType.CAUSAL_LM if facts.kind == "causal" else None


def _ends(linear: str, name: str) -> bool:
    return linear == name or linear.endswith(f".{name}")


def _tail(name: str, parts: int) -> str:
    """The last `parts` parts of a dotted name, but no further up than the block's number."""
    inside = name.split(".")
    number = max(k for k, part in enumerate(inside) if part.isdigit())
    return ".".join(inside[max(number + 1, len(inside) - parts) :] or inside[number:])


def _prefix_tokens(facts: ModelFacts, examples: Batch | None, length: int, seed: int) -> torch.Tensor:
    """Token ids [1, length] the prefix starts from."""
    if examples is None:
        _log.warning("No prompt was given to start the prefix from: it starts from random tokens.")
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(facts.vocab, (1, length), generator=generator)
    real = examples.input_ids[examples.attention_mask.bool()].cpu()
    return real.repeat(-(-length // len(real)))[:length].unsqueeze(0)


def _kept(model: PreTrainedModel, tokens: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """What the backbone keeps of the tokens: key, value of layer 0, of layer 1 …, each [1, heads, T, size]."""
    cache = DynamicCache(config=model.config.get_text_config())
    model.eval()
    with torch.no_grad(), autocast(model.device, dtype):
        model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache)
    layers: list[Any] = list(cache.layers)
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def _shown(model: torch.nn.Module, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits for the first tokens again, the model having been shown all of them before."""
    twice = torch.cat([tokens, tokens[:, :4]], dim=1)
    with torch.no_grad(), autocast(tokens.device, dtype):
        logits = model(input_ids=twice, attention_mask=torch.ones_like(twice)).logits
    return logits[:, tokens.shape[1] :] if logits.ndim == 3 else logits


def _prove(
    wrapped: PeftModel, tokens: torch.Tensor, shown: torch.Tensor, dtype: torch.dtype, facts: ModelFacts
) -> None:
    wrapped.eval()
    again = tokens[:, :4]
    with torch.no_grad(), autocast(tokens.device, dtype):
        logits = wrapped(input_ids=again, attention_mask=torch.ones_like(again)).logits
    scale = shown.float().abs().max().clamp(min=1e-6)
    off = float((logits.float() - shown.float()).abs().max() / scale)
    if not off <= (1e-3 if dtype == torch.float32 else 0.1):
        raise UnsupportedError(
            f"A prefix must do what showing its tokens does. Received {facts.architecture}, where PEFT's prefix is "
            f"off by {off:.1%}. Try --adapter lora."
        )
