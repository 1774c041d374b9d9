"""A learned prefix starts as what the model keeps of real tokens, and then does what showing them does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForMaskedLM

from tests.models.common import CPU, LABELS, batch_of, facts_of, form_of, load, logits_of
from tests.tiny import CAUSAL, KINDS
from tunefork.batch import Batch
from tunefork.errors import UnsupportedError
from tunefork.models import (
    autocast,
    bare_model,
    check_support,
    inspect_model,
    load_base,
    load_model,
    quiet,
    trainable_state,
)
from tunefork.recipe.schema import AdapterSection, ModelSection

Tiny = Callable[[str], Path]
DTYPES = (torch.float32, torch.bfloat16)


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])


@pytest.mark.parametrize("kind", [*CAUSAL, "embedded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_starts_as_the_tokens_it_stands_for(kind: str, dtype: torch.dtype, tiny: Tiny) -> None:
    facts = inspect_model(ModelSection()) if kind == "embedded" else facts_of(tiny(kind))
    batch = batch_of(facts)
    shown, ids = batch.input_ids[:1, :4], batch.input_ids[1:, :7]
    model = load(facts, "prefix", "text", dtype=dtype).eval()
    base = load_base(facts, "text", (), CPU, dtype)
    with torch.no_grad(), autocast(CPU, dtype):
        prefixed = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        both = base(input_ids=torch.cat([shown, ids], dim=1)).logits[:, 4:]
        alone = base(input_ids=ids).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(prefixed.float(), both.float(), atol=tolerance, rtol=tolerance)
    assert (prefixed.float() - alone.float()).abs().max() > 10 * tolerance  # and it does something
    assert abs(_cross_entropy(prefixed, ids) - _cross_entropy(both, ids)) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_from_the_first_tokens_of_the_examples(kind: str, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    starts = [trainable_state(load(facts, "prefix", "head", seed=seed)) for seed in (0, 1)]
    name = "prompt_encoder.default.embedding.weight"
    assert torch.equal(starts[0][name], starts[1][name])  # of the examples, not of the seed
    random = _without_examples(facts, 0)
    assert not torch.equal(trainable_state(random)[name], starts[0][name])
    assert torch.equal(trainable_state(random)[name], trainable_state(_without_examples(facts, 0))[name])


def _without_examples(facts: Any, seed: int) -> torch.nn.Module:
    return load_model(
        facts,
        form="head",
        labels=LABELS,
        adapter=AdapterSection(name="prefix", prefix_tokens=4),
        device=CPU,
        dtype=torch.float32,
        seed=seed,
        activation_checkpointing=False,
        prefix_examples=None,
    )


def test_without_examples_it_says_so(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _without_examples(facts_of(tiny("llama")), 0)
    assert "random tokens" in caplog.text


def test_examples_shorter_than_the_prefix_are_repeated(tiny: Tiny) -> None:
    facts = facts_of(tiny("llama"))
    model: Any = load(facts, "prefix", "text", prefix_tokens=40)
    assert model.prompt_encoder["default"].embedding.weight.shape[0] == 40


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_an_encoder_uses_every_position_of_it(kind: str, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    model, batch = load(facts, "prefix", "head").train(), batch_of(facts)
    logits_of(model, batch).pow(2).sum().backward()
    gradient = dict(model.named_parameters())["prompt_encoder.default.embedding.weight"].grad
    assert gradient is not None and (gradient.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("kind", CAUSAL)
def test_generation_sees_it(kind: str, tiny: Tiny) -> None:
    """Greedy generation, left-padded, is the argmax of forward passes over the unpadded prompt."""
    facts = facts_of(tiny(kind))
    model: Any = load(facts, "prefix", "text").eval()
    prompt = batch_of(facts).input_ids[1:, :5]
    grown = prompt
    with torch.inference_mode():
        for _ in range(5):
            following = model(input_ids=grown, attention_mask=torch.ones_like(grown)).logits[:, -1].argmax(-1)
            grown = torch.cat([grown, following[:, None]], dim=1)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt], dim=1)
        mask = (torch.arange(8) >= 3).long()[None]
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(input_ids=padded, attention_mask=mask, **options)
    assert torch.equal(out[:, 3:], grown)


def test_it_cannot_be_had_with_activation_checkpointing(tiny: Tiny) -> None:
    facts = facts_of(tiny("llama"))
    with pytest.raises(UnsupportedError, match="activation_checkpointing=false"):
        check_support(facts, "prefix", "text", "backprop", activation_checkpointing=True)
    with pytest.raises(UnsupportedError, match="activation_checkpointing=false"):
        load(facts, "prefix", "text", checkpointing=True)


def test_one_longer_than_a_sliding_window_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UnsupportedError, match="prefix_tokens"):
        load(facts_of(tiny("gemma")), "prefix", "text", prefix_tokens=70)  # the window is 64


def test_grouped_heads_are_kept_apart(tiny: Tiny) -> None:
    """The prefix of each layer and head is the cache of that layer and head."""
    facts = facts_of(tiny("llama"))
    model: Any = load(facts, "prefix", "text").eval()
    batch: Batch = batch_of(facts)
    with torch.no_grad():
        kept = bare_model(model)(input_ids=batch.input_ids[:1, :4], use_cache=True).past_key_values
        learned = model.get_prompt(batch_size=1)
    for real, made in zip(kept.layers, learned.layers, strict=True):
        assert real.keys.shape == (1, 2, 4, 8)
        assert torch.equal(real.keys, made.keys) and torch.equal(real.values, made.values)


def test_encoders_without_a_cache_are_refused(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    with quiet():
        DistilBertForMaskedLM(config).save_pretrained(tmp_path)
    check_support(facts_of(tmp_path), "lora", "head", "backprop")
    with pytest.raises(UnsupportedError, match="--adapter lora"):
        check_support(facts_of(tmp_path), "prefix", "head", "backprop")


def test_masked_models_asked_in_words_are_refused(tiny: Tiny) -> None:
    for kind in ("roberta", "bert"):
        with pytest.raises(UnsupportedError, match="--adapter lora"):
            load(facts_of(tiny(kind)), "prefix", form_of(kind, False))
