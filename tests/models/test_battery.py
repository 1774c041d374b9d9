"""Every kind of model with every adapter: what is trained, what is kept, and that others can load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.pytorch_utils import Conv1D

from tests.models.common import CPU, LABELS, batch_of, facts_of, form_of, load, logits_of, loss_of, step
from tests.tiny import CAUSAL, KINDS
from tunefork.errors import UnsupportedError
from tunefork.models import (
    check_support,
    load_artefact,
    load_tokenizer,
    load_trainable_state,
    quiet,
    read_artefact_info,
    save_artefact,
    trainable_state,
)

ADAPTERS = ("none", "lora", "qlora", "dora", "prefix", "head")
REFUSED = {(kind, "head", False) for kind in KINDS} | {(kind, "prefix", False) for kind in ("roberta", "bert")}
ALLOWED = [(k, a, h) for k in KINDS for a in ADAPTERS for h in (False, True) if (k, a, h) not in REFUSED]
FAST = [c for c in ALLOWED if c[0] in ("llama", "gpt2", "bert")]
BF16 = [(k, a, True) for k in ("llama", "bert") for a in ADAPTERS] + [("gpt2", a, False) for a in ADAPTERS[:5]]

Tiny = Callable[[str], Path]


def _mostly_slow(cases: list[tuple[str, str, bool]]) -> list[Any]:
    """Three kinds always; the others, which differ in little here, where there is time."""
    return [pytest.param(*c, marks=() if c in FAST else pytest.mark.slow) for c in cases]


def _plain(folder: Path, base: Path, kind: str, adapter: str, head: bool) -> Any:
    """What someone without this package gets: transformers and, for adapters, PEFT."""
    auto = AutoModelForSequenceClassification if head else AutoModelForMaskedLM
    auto = AutoModelForCausalLM if kind in CAUSAL and not head else auto
    with quiet():
        if adapter in ("none", "head"):
            return auto.from_pretrained(folder).eval()
        torch.manual_seed(5)
        model = auto.from_pretrained(base, **({"num_labels": len(LABELS)} if head else {}))
        if head and kind in CAUSAL:
            model.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id  # GPT-2's config has none
        return PeftModel.from_pretrained(model, folder).eval()


def _expected(name: str, adapter: str, head_names: tuple[str, ...]) -> bool:
    if adapter == "none":
        return True
    if "original_module" in name:
        return False
    in_head = any(f"{h}." in name for h in head_names)
    markers = {"lora": ("lora_",), "qlora": ("lora_",), "dora": ("lora_",), "prefix": ("prompt_encoder",), "head": ()}
    return in_head or any(marker in name for marker in markers[adapter])


@pytest.mark.parametrize(("kind", "adapter", "head"), ALLOWED)
def test_exactly_the_right_weights_are_trained_and_changed(kind: str, adapter: str, head: bool, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    model, batch = load(facts, adapter, form_of(kind, head)), batch_of(facts)
    heads = ("score", "classifier", "pooler") if head else ()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == _expected(name, adapter, heads), name
        assert not parameter.requires_grad or parameter.dtype == torch.float32
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    step(model, batch)
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        first_step = "lora_A" in name and adapter != "dora"  # its gradient is zero while B is
        if not parameter.requires_grad or first_step:
            assert same, name
        elif "lora_A" not in name and not _unused(name):
            assert not same, name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def _unused(name: str) -> bool:
    """Weights a correct step may leave alone: a pooler that masked training skips, biases softmax cannot see."""
    return name.endswith(("k_proj.bias", "key.bias")) or "token_type" in name


@pytest.mark.parametrize(("kind", "adapter", "head"), ALLOWED)
def test_saved_and_loaded_gives_bitwise_the_same_logits(
    kind: str, adapter: str, head: bool, tiny: Tiny, tmp_path: Path
) -> None:
    facts = facts_of(tiny(kind))
    model, batch = load(facts, adapter, form_of(kind, head)), batch_of(facts)
    untouched = logits_of(model.eval(), batch)
    step(model, batch)
    step(model, batch)
    trained = logits_of(model, batch).detach()
    assert not torch.equal(trained, untouched)
    save_artefact(model, load_tokenizer(facts), facts, tmp_path / "a", {"form": form_of(kind, head)})
    assert torch.equal(logits_of(model, batch), trained)
    again, tokenizer, found = load_artefact(tmp_path / "a", CPU, torch.float32)
    assert torch.equal(logits_of(again, batch), trained)
    assert found.kind == facts.kind
    assert tokenizer("The man")["input_ids"] == load_tokenizer(facts)("The man")["input_ids"]
    assert not any(p.requires_grad for p in again.parameters())
    info = read_artefact_info(tmp_path / "a")
    assert (info["adapter"], info["head"], info["labels"]) == (adapter, head, list(LABELS) if head else [])
    assert not {p.suffix for p in (tmp_path / "a").iterdir()} & {".bin", ".pt", ".pkl", ".pth"}


@pytest.mark.parametrize(("kind", "adapter", "head"), _mostly_slow([c for c in ALLOWED if c[1] != "qlora"]))
def test_plain_peft_or_transformers_gives_the_same_logits(
    kind: str, adapter: str, head: bool, tiny: Tiny, tmp_path: Path
) -> None:
    facts = facts_of(tiny(kind))
    model, batch = load(facts, adapter, form_of(kind, head)), batch_of(facts)
    step(model, batch)
    save_artefact(model, load_tokenizer(facts), facts, tmp_path / "a", {})
    plain = _plain(tmp_path / "a", tiny(kind), kind, adapter, head)
    if head and adapter in ("none", "head"):
        assert plain.config.id2label == dict(enumerate(LABELS))
    difference = (logits_of(plain, batch) - logits_of(model, batch)).abs().max()
    assert difference <= 1e-6


@pytest.mark.parametrize(("kind", "adapter", "head"), BF16)
def test_in_bf16_too(kind: str, adapter: str, head: bool, tiny: Tiny, tmp_path: Path) -> None:
    facts, dtype = facts_of(tiny(kind)), torch.bfloat16
    model, batch = load(facts, adapter, form_of(kind, head), dtype=dtype), batch_of(facts)
    frozen = {p.dtype for n, p in model.named_parameters() if not p.requires_grad and p.is_floating_point()}
    assert frozen == (set() if adapter == "none" else {dtype})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    step(model, batch, dtype)
    trained = logits_of(model, batch, dtype)
    save_artefact(model, load_tokenizer(facts), facts, tmp_path / "a", {})
    again, _, _ = load_artefact(tmp_path / "a", CPU, dtype)
    assert torch.equal(logits_of(again, batch, dtype), trained)
    state = {n: p for n, p in model.named_parameters() if p.requires_grad}
    restored = dict(again.named_parameters())
    assert all(torch.equal(restored[n], p) for n, p in state.items())  # nothing was rounded on the way to the disk


@pytest.mark.parametrize(("kind", "adapter", "head"), FAST)
def test_trainable_state_round_trips(kind: str, adapter: str, head: bool, tiny: Tiny) -> None:
    facts, batch = facts_of(tiny(kind)), batch_of(facts_of(tiny(kind)))
    model = load(facts, adapter, form_of(kind, head))
    step(model, batch)
    state = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    other = load(facts, adapter, form_of(kind, head), seed=9)
    load_trainable_state(other, state)
    assert torch.equal(logits_of(other.eval(), batch), logits_of(model, batch))
    step(model, batch)
    assert not all(torch.equal(state[n], t) for n, t in trainable_state(model).items())  # a copy, not a view


@pytest.mark.parametrize(("kind", "adapter", "head"), sorted(REFUSED))
def test_what_cannot_be_done_is_refused_before_loading(kind: str, adapter: Any, head: bool, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    with pytest.raises(UnsupportedError, match="Try "):
        check_support(facts, adapter, form_of(kind, head), "backprop")
    with pytest.raises(UnsupportedError, match="Try "):
        load(facts, adapter, form_of(kind, head))


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("adapter", ["none", "lora", "prefix"])
def test_logits_only_where_asked(kind: str, adapter: str, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    model, batch = load(facts, adapter, "text").eval(), batch_of(facts)
    places = torch.tensor([1, 4, 6])
    some = logits_of(model, batch, logits_to_keep=places)
    assert torch.allclose(some, logits_of(model, batch)[:, places], atol=1e-6)


@pytest.mark.parametrize(("kind", "adapter", "head"), _mostly_slow([c for c in ALLOWED if c[1] != "prefix"]))
def test_checkpointed_activations_give_the_same_gradient(kind: str, adapter: str, head: bool, tiny: Tiny) -> None:
    facts, batch = facts_of(tiny(kind)), batch_of(facts_of(tiny(kind)))
    gradients = []
    for checkpointing in (False, True):
        model = load(facts, adapter, form_of(kind, head), checkpointing=checkpointing).train()
        torch.manual_seed(3)  # dropout
        loss_of(model, batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_padding(kind: str, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    for adapter in ("lora", "prefix"):
        model, batch = load(facts, adapter, "head").eval(), batch_of(facts)
        alone = model(input_ids=batch.input_ids[1:, :7], attention_mask=batch.attention_mask[1:, :7]).logits
        assert torch.allclose(alone, logits_of(model, batch)[1:], atol=1e-5)


def test_lora_reaches_every_block_and_nothing_else(tiny: Tiny) -> None:
    for kind in KINDS:
        for head in (False, True):
            model: Any = load(facts_of(tiny(kind)), "lora", form_of(kind, head))
            reached = {
                n.split(".lora_A")[0].removeprefix("base_model.model.")
                for n in trainable_state(model)
                if ".lora_A" in n
            }
            base = model.get_base_model()
            linear = (torch.nn.Linear, Conv1D)
            wanted = {
                n for n, m in base.named_modules() if n in reached or (isinstance(m, linear) and ".lora_" not in n)
            }
            wanted = {n.removesuffix(".base_layer") for n in wanted if any(p.isdigit() for p in n.split("."))}
            assert reached == wanted and len(reached) % facts_of(tiny(kind)).layers == 0
