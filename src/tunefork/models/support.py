"""What cannot be done for a model is refused here, by name, before anything is loaded."""

from __future__ import annotations

from tunefork.errors import UnsupportedError
from tunefork.models.facts import ModelFacts
from tunefork.models.quantize import require_bitsandbytes
from tunefork.recipe.schema import AdapterName, AdapterSection

Form = str
"""How a task asks: verbalizer, choice, head, text or chat."""


def check_support(
    facts: ModelFacts,
    adapter: AdapterName,
    form: Form,
    method: str,
    *,
    activation_checkpointing: bool = False,
) -> None:
    """Raises UnsupportedError or MissingExtraError naming what to use instead; returns nothing when all is well."""
    _check_form(facts, form)
    if adapter == "head" and form != "head":
        raise UnsupportedError(
            f"Adapter head trains a classification head, and this task is asked as {form}. "
            f"Received adapter head with method {method}. Try --adapter lora, or --set task.form=head for a "
            "classification task."
        )
    if adapter in ("none", "head") and facts.quantized:  # transformers cannot write a model it has read as NF4
        raise UnsupportedError(
            f"Adapter {adapter} (method {method}) keeps a whole model, which needs weights that are not quantised. "
            f"Received {facts.name!r}, stored as NF4. Try --adapter qlora, which trains a head too where there is one."
        )
    if adapter == "prefix":
        _check_prefix(facts, form, activation_checkpointing)
    if activation_checkpointing and not facts.can_checkpoint:
        raise UnsupportedError(
            f"Activation checkpointing must be offered by the architecture. Received {facts.architecture}, which does "
            "not. Try --set train.activation_checkpointing=false."
        )
    if adapter == "qlora" or facts.quantized:
        require_bitsandbytes()


def usable_positions(facts: ModelFacts, adapter: AdapterSection) -> int:
    """Longest sequence in tokens that fits beside what the adapter itself takes up: a prefix stands in the context."""
    return facts.max_positions - (adapter.prefix_tokens if adapter.name == "prefix" else 0)


def _check_form(facts: ModelFacts, form: Form) -> None:
    if form == "head":
        if not facts.has_head_class:
            raise UnsupportedError(
                f"A classification head must exist for the architecture. Received {facts.architecture}, for which "
                "transformers has none. Try --set task.form=verbalizer."
            )
        return
    if facts.kind == "encoder":
        raise UnsupportedError(
            f"A task asked as {form} needs a causal or masked model. Received {facts.name!r}, an encoder "
            f"({facts.architecture}). Try a classification task with --set task.form=head, or a causal model."
        )
    if facts.kind == "masked" and form in ("text", "chat"):
        raise UnsupportedError(
            f"A task asked as {form} needs a causal model, which writes. Received {facts.name!r}, a masked one "
            f"({facts.architecture}). Try a causal model."
        )


def _check_prefix(facts: ModelFacts, form: Form, activation_checkpointing: bool) -> None:
    if facts.kind == "masked" and form != "head":
        raise UnsupportedError(
            f"A prefix is offered for causal models, and for others with a head. Received {facts.name!r}, a masked "
            "model asked in words, which PEFT cannot do. Try --adapter lora, or --set task.form=head."
        )
    if not facts.has_plain_cache:
        raise UnsupportedError(
            "A prefix stands for the keys and values every layer keeps. Received "
            f"{facts.architecture}, whose layers keep something else. Try --adapter lora."
        )
    if activation_checkpointing:
        raise UnsupportedError(
            "A prefix lives in the cache, which activation checkpointing does without. Received both. "
            "Try --set train.activation_checkpointing=false, or --adapter lora."
        )
