"""Heads, tokenizers, devices, checkpoint state and artefacts at their edges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, PreTrainedModel

from tests.models.common import CPU, LABELS, batch_of, facts_of, form_of, load, logits_of, step
from tests.tiny import CAUSAL, KINDS, tiny_model
from tunefork.errors import MissingFileError, RecipeError, RunError, UnsupportedError
from tunefork.models import (
    autocast,
    bare_model,
    choose_device,
    choose_dtype,
    inspect_model,
    load_artefact,
    load_base,
    load_tokenizer,
    load_trainable_state,
    quiet,
    read_artefact_info,
    save_artefact,
    torch_dtype,
    trainable_state,
)
from tunefork.recipe.schema import ModelSection

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["none", "lora", "head"])
def test_fresh_weights_are_a_function_of_the_seed(kind: str, adapter: str, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = trainable_state(load(facts, adapter, "head", seed=1))
    assert torch.equal(torch.rand(3), expected)  # the global state was left alone
    same, other = (trainable_state(load(facts, adapter, "head", seed=s)) for s in (1, 2))
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)
    in_bf16 = trainable_state(load(facts, adapter, "head", seed=1, dtype=torch.bfloat16))
    if adapter != "none":
        assert all(torch.allclose(first[n], in_bf16[n], atol=2e-3) for n in first)


def test_an_adapter_starts_as_the_model_itself(tiny: Tiny) -> None:
    for kind in KINDS:
        facts = facts_of(tiny(kind))
        base = load_base(facts, form_of(kind, False), (), CPU, torch.float32)
        for adapter in ("lora", "dora"):
            model = load(facts, adapter, form_of(kind, False)).eval()
            difference = (logits_of(model, batch_of(facts)) - logits_of(base, batch_of(facts))).abs().max()
            assert difference <= (0 if adapter == "lora" else 1e-5)


def test_a_trained_head_is_kept_for_its_own_labels_only(tiny: Tiny, tmp_path: Path) -> None:
    facts = facts_of(tiny("bert"))
    model, batch = load(facts, "none", "head"), batch_of(facts)
    step(model, batch)
    save_artefact(model, load_tokenizer(facts), facts, tmp_path / "a", {})
    kept = facts_of(tmp_path / "a")
    assert kept.kind == "encoder"
    found = load_base(kept, "head", LABELS, CPU, torch.float32)
    assert torch.equal(logits_of(found, batch), logits_of(model, batch))
    for labels in (("x", "y", "z"), ("bad", "good")):
        fresh: Any = load_base(kept, "head", labels, CPU, torch.float32)
        assert fresh.config.id2label == dict(enumerate(labels))
        assert logits_of(fresh, batch).shape == (2, len(labels))
        assert not torch.equal(fresh.classifier.weight[:2], bare_model(model).get_submodule("classifier").weight[:2])


@pytest.mark.parametrize("labels", [(), ("only",), ("twice", "twice")])
def test_labels_that_make_no_head_are_refused(labels: tuple[str, ...], tiny: Tiny) -> None:
    with pytest.raises(UnsupportedError, match="two labels"):
        load_base(facts_of(tiny("bert")), "head", labels, CPU, torch.float32)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_head_reads_the_last_real_token(kind: str, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    model: Any = load(facts, "none", "head").eval()
    batch = batch_of(facts)
    with torch.no_grad():
        states = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        assert torch.allclose(logits_of(model, batch)[1], model.score(states[1, 6]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pad_token_spares_the_end_token(kind: str, tiny: Tiny) -> None:
    tokenizer = load_tokenizer(facts_of(tiny(kind)))
    assert tokenizer.pad_token_id is not None
    if kind != "gpt2":  # which has no other token to spare
        assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_pad_token_that_cannot_be_used_is_replaced(tiny: Tiny, tmp_path: Path) -> None:
    for wanted in ("the end token", "one without an embedding"):
        folder = shutil.copytree(tiny("llama"), tmp_path / wanted)
        tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
        if wanted == "the end token":
            tokenizer.pad_token = tokenizer.eos_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
            assert tokenizer.pad_token_id == 512
        tokenizer.save_pretrained(folder)
        found = load_tokenizer(facts_of(folder))
        assert (found.pad_token, found.eos_token) == ("<pad>", "<|end|>")


def test_a_model_without_a_tokenizer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("bert"), tmp_path / "a")
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(UnsupportedError, match="tokenizer"):
        load_tokenizer(facts_of(folder))


def test_state_that_does_not_fit_is_refused_and_changes_nothing(tiny: Tiny) -> None:
    facts = facts_of(tiny("llama"))
    model = load(facts, "lora", "text")
    state = {n: t + 1 for n, t in trainable_state(model).items()}
    first, *_, last = state
    before = trainable_state(model)
    wrong: list[dict[str, torch.Tensor]] = [
        {n: t for n, t in state.items() if n != last},
        {**state, "base_model.model.lm_head.weight": torch.ones(512, 32)},
        {**state, last: torch.ones(2, 2)},
        {**state, last: state[last].to(torch.bfloat16)},
    ]
    for one in wrong:
        with pytest.raises(RunError, match="Try the recipe"):
            load_trainable_state(model, one)
        assert all(torch.equal(t, before[n]) for n, t in trainable_state(model).items())
    load_trainable_state(model, state)
    assert torch.equal(trainable_state(model)[first], before[first] + 1)


def _saved(tiny: Tiny, folder: Path, adapter: str = "lora", base: Path | None = None) -> Any:
    facts = facts_of(base or tiny("llama"))
    model = load(facts, adapter, "text")
    step(model, batch_of(facts))
    save_artefact(model, load_tokenizer(facts), facts, folder, {"task": {"name": "x"}, "ü": 1})
    return logits_of(model, batch_of(facts))


def test_what_the_caller_adds_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    _saved(tiny, tmp_path / "a")
    assert read_artefact_info(tmp_path / "a")["extra"] == {"task": {"name": "x"}, "ü": 1}
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "a").chat_template
        == AutoTokenizer.from_pretrained(tiny("llama")).chat_template
    )


def test_an_adapter_whose_base_changed_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    trained = _saved(tiny, tmp_path / "a", base=base)
    moved = tmp_path / "moved"
    base.rename(moved)
    with pytest.raises(MissingFileError):
        load_artefact(tmp_path / "a", CPU, torch.float32)
    model, _, facts = load_artefact(tmp_path / "a", CPU, torch.float32, base=str(moved))
    assert torch.equal(logits_of(model, batch_of(facts)), trained)
    tiny_model("llama", base, seed=1)
    with pytest.raises(RunError, match="Try the original model"):
        load_artefact(tmp_path / "a", CPU, torch.float32)


def test_a_base_named_by_a_relative_path_is_found_from_elsewhere(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    trained = _saved(tiny, tmp_path / "a", base=Path("base"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, _, facts = load_artefact(tmp_path / "a", CPU, torch.float32)
    assert torch.equal(logits_of(model, batch_of(facts)), trained)
    with quiet():
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert torch.allclose(logits_of(plain, batch_of(facts)), trained, atol=1e-6)


def test_the_embedded_model_is_named_and_found_by_peft(tmp_path: Path) -> None:
    facts = inspect_model(ModelSection())
    model = load(facts, "lora", "text", dtype=torch.bfloat16)
    step(model, batch_of(facts), torch.bfloat16)
    save_artefact(model, load_tokenizer(facts), facts, tmp_path / "a", {})
    _, _, found = load_artefact(tmp_path / "a", CPU, torch.bfloat16)
    assert (found.name, found.fingerprint) == ("embedded", facts.fingerprint)
    with quiet():
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert torch.allclose(logits_of(plain, batch_of(facts)), logits_of(model, batch_of(facts)), atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "renamed", "gone", "schema", "no-info"])
def test_a_damaged_artefact_is_refused(damage: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    _saved(tiny, folder)
    weights, info = folder / "adapter_model.safetensors", folder / "tunefork.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "renamed":
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "r": 3}))
    elif damage == "gone":
        weights.unlink()
    elif damage == "schema":
        info.write_text(info.read_text().replace('"schema": 1', '"schema": 2'))
    else:
        info.unlink()
    with pytest.raises((RunError, MissingFileError), match="must"):
        load_artefact(folder, CPU, torch.float32)


def test_code_that_comes_with_a_base_is_not_run_unasked(tiny: Tiny, tmp_path: Path) -> None:
    _saved(tiny, tmp_path / "a")
    info = tmp_path / "a" / "tunefork.json"
    info.write_text(info.read_text().replace('"trust_remote_code": false', '"trust_remote_code": true'))
    with pytest.raises(UnsupportedError, match="trust_remote_code=True"):
        load_artefact(tmp_path / "a", CPU, torch.float32)


def test_a_model_with_inconsistent_generation_settings_is_saved(tiny: Tiny, tmp_path: Path) -> None:
    base = shutil.copytree(tiny("llama"), tmp_path / "base")
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [6, 1]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    facts = facts_of(base)
    model: Any = load(facts, "none", "text", checkpointing=True)
    save_artefact(model, load_tokenizer(facts), facts, tmp_path / "a", {})
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text()) == settings
    assert model.generation_config.temperature == 0.6
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["dtype"], config["use_cache"]) == ("float32", True)  # checkpointing had turned it off


def test_tied_weights_stay_tied(tiny: Tiny, tmp_path: Path) -> None:
    facts = facts_of(tiny("qwen"))
    model = load(facts, "none", "text")
    step(model, batch_of(facts))
    assert "lm_head.weight" not in trainable_state(model)
    save_artefact(model, load_tokenizer(facts), facts, tmp_path / "a", {})
    again: Any = load_artefact(tmp_path / "a", CPU, torch.float32)[0]
    assert isinstance(again, PreTrainedModel)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_an_untrained_model_is_no_artefact(tiny: Tiny, tmp_path: Path) -> None:
    facts = facts_of(tiny("llama"))
    with pytest.raises(RunError, match="trained"):
        save_artefact(load_base(facts, "text", (), CPU, torch.float32), load_tokenizer(facts), facts, tmp_path, {})


def test_device_and_dtype_come_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert choose_device(ModelSection(device="cpu")) == (CPU, "as asked")
    assert choose_dtype(ModelSection(dtype="bf16"), CPU) == ("bf16", "as asked")
    name, reason = choose_dtype(ModelSection(), CPU)
    assert name == "fp32" and "CPU" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(ModelSection()) == (CPU, "no accelerator was found")
    for missing in ("cuda", "mps"):
        with pytest.raises(UnsupportedError, match="--device auto"):
            choose_device(ModelSection(device=missing))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    device, reason = choose_device(ModelSection())
    assert device == torch.device("cuda", 0) and "first of 3" in reason
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype(ModelSection(), device)[0] == "fp16"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="torchrun"):
        choose_device(ModelSection())


def test_dtype_names() -> None:
    assert [torch_dtype(name).itemsize for name in ("fp32", "bf16", "fp16")] == [4, 2, 2]
    with pytest.raises(RecipeError):
        torch_dtype("fp8")
    with autocast(CPU, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
