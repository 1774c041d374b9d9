"""NF4: what is quantised, that evaluating and saving never harm it, and that nothing is fetched for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tests.models.common import CPU, batch_of, facts_of, form_of, load, logits_of, step
from tests.tiny import KINDS
from tunefork.errors import MissingExtraError, UnsupportedError
from tunefork.models import (
    autocast,
    check_support,
    load_artefact,
    load_base,
    load_tokenizer,
    quantized_layers,
    quiet,
    save_artefact,
)

Tiny = Callable[[str], Path]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def stored(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama stored as NF4, as published 4-bit models are: by plain transformers, double quantisation on."""
    folder = tmp_path_factory.mktemp("stored") / "nf4"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=settings, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    facts = facts_of(tiny("llama"))
    load_tokenizer(facts).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [False, True])
def test_the_blocks_are_quantised_and_the_rest_is_not(kind: str, head: bool, tiny: Tiny) -> None:
    model: Any = load(facts_of(tiny(kind)), "qlora", form_of(kind, head))
    inside = {id(layer) for layer in quantized_layers(model)}
    names = {n for n, m in model.get_base_model().named_modules() if id(m) in inside}
    assert names and all(any(part.isdigit() for part in n.split(".")) for n in names)
    assert len(names) % 2 == 0  # the same in both blocks
    assert all(layer.weight.quant_type == "nf4" for layer in quantized_layers(model))
    output = model.get_base_model().get_output_embeddings()
    if output is not None:
        assert output.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_evaluating_and_saving_leave_the_base_as_it_was(
    kind: str, dtype: torch.dtype, tiny: Tiny, tmp_path: Path
) -> None:
    facts = facts_of(tiny(kind))
    model, batch = load(facts, "qlora", form_of(kind, False), dtype=dtype), batch_of(facts)
    step(model, batch, dtype)
    with torch.inference_mode():
        before = logits_of(model, batch, dtype)
    save_artefact(model, load_tokenizer(facts), facts, tmp_path / "a", {})
    model.state_dict()
    with torch.inference_mode():
        assert torch.equal(logits_of(model, batch, dtype), before)
    model.train()
    with torch.no_grad():
        assert torch.isfinite(logits_of(model, batch, dtype)).all()
    again, _, _ = load_artefact(tmp_path / "a", CPU, dtype)
    assert torch.equal(logits_of(again, batch, dtype), before)


def test_evaluation_computes_what_training_does(tiny: Tiny) -> None:
    """The packed kernel the guard turns off computes in bf16 whatever was asked; without it fp32 stays fp32."""
    facts = facts_of(tiny("llama"))
    model, batch = load(facts, "qlora", "text"), batch_of(facts)
    with torch.no_grad():
        evaluated = logits_of(model.eval(), batch)
        assert torch.equal(logits_of(model.train(), batch), evaluated)


def test_layers_the_cpu_kernel_cannot_do_are_left_alone(tmp_path: Path, tiny: Tiny) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config.intermediate_size = 72  # gate and up give 72 outputs, keys and values 16
    with quiet():
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(facts_of(tiny("llama"))).save_pretrained(tmp_path)
    facts = facts_of(tmp_path)
    model: Any = load(facts, "qlora", "text").eval()
    inside = {id(layer) for layer in quantized_layers(model)}
    names = {n.rpartition(".")[2] for n, m in model.get_base_model().named_modules() if id(m) in inside}
    assert names <= {"q_proj", "o_proj", "down_proj", "base_layer"} and inside
    assert all(layer.out_features % 32 == 0 for layer in quantized_layers(model))
    with torch.inference_mode():
        assert torch.isfinite(logits_of(model, batch_of(facts))).all()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("adapter", ["qlora", "lora", "dora", "prefix"])
def test_a_base_stored_as_nf4(adapter: str, head: bool, stored: Path, tmp_path: Path) -> None:
    facts, dtype = facts_of(stored), torch.bfloat16
    assert facts.quantized and facts.kind == "causal"
    model, batch = load(facts, adapter, form_of("llama", head), dtype=dtype), batch_of(facts)
    assert len(quantized_layers(model)) == 14
    step(model, batch, dtype)
    trained = logits_of(model, batch, dtype)
    save_artefact(model, load_tokenizer(facts), facts, tmp_path / "a", {})
    assert torch.equal(logits_of(model, batch, dtype), trained)
    again, _, _ = load_artefact(tmp_path / "a", CPU, dtype)
    assert torch.equal(logits_of(again, batch, dtype), trained)


def test_a_base_stored_as_nf4_computes_as_plain_transformers_does(stored: Path) -> None:
    facts = facts_of(stored)
    with autocast(CPU, torch.float32):
        ours = logits_of(load_base(facts, "text", (), CPU, torch.float32), batch_of(facts))
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32).train()
    for layer in quantized_layers(plain):
        layer.compute_dtype, layer.compute_type_is_set = torch.float32, True
    with torch.no_grad():
        assert torch.allclose(logits_of(plain, batch_of(facts)), ours, atol=1e-6)


def test_keeping_a_whole_quantised_model_is_refused(stored: Path) -> None:
    for adapter in ("none", "head"):
        with pytest.raises(UnsupportedError, match="--adapter qlora"):
            check_support(facts_of(stored), adapter, "head", "backprop")


def test_without_bitsandbytes_qlora_names_the_extra(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"tunefork\[qlora\]"):
        check_support(facts_of(tiny("llama")), "qlora", "text", "backprop")


@pytest.mark.parametrize("module", ["tasks", "train.skeleton", "export.merge"])
def test_whatever_is_imported_first_nothing_is_said(module: str) -> None:
    command = [sys.executable, "-c", f"import tunefork.{module}"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert said.stdout + said.stderr == ""


def test_nothing_is_fetched_and_nothing_is_said(tiny: Tiny, tmp_path: Path) -> None:
    """In a process of its own, online as far as it knows, with a `kernels` package that would fetch one."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*a, **k):\n    raise SystemExit('a kernel was asked for')\n")
    script = f"""
import socket, sys
def refuse(*a, **k):
    sys.exit("the network was tried")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import torch
import tunefork.models as models
import kernels
from tunefork.recipe.schema import AdapterSection, ModelSection
facts = models.inspect_model(ModelSection(name={str(tiny("gpt2"))!r}))
tokenizer = models.load_tokenizer(facts)
ids = torch.tensor([tokenizer("It was great!")["input_ids"]])
torch.set_num_threads(1)
combinations = [("qlora", "text"), ("lora", "text"), ("none", "text"), ("prefix", "text"), ("qlora", "head")]
for n, (adapter, form) in enumerate(combinations):
    for checkpointing in ((False, True) if adapter in ("qlora", "none") else (False,)):
        model = models.load_model(
            facts, form=form, labels=("a", "b") if form == "head" else (), adapter=AdapterSection(name=adapter, rank=2),
            device=torch.device("cpu"), dtype=torch.bfloat16, seed=0, activation_checkpointing=checkpointing,
            prefix_examples=models_batch(ids) if adapter == "prefix" else None,
        )
        with models.autocast(torch.device("cpu"), torch.bfloat16):
            model.train()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().sum().backward()
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
            if form == "text":
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, pad_token_id=0)
    models.save_artefact(model, tokenizer, facts, {str(tmp_path)!r} + f"/a{{n}}", {{}})
    models.load_artefact({str(tmp_path)!r} + f"/a{{n}}", torch.device("cpu"), torch.bfloat16)
print("done")
"""
    script = script.replace(
        "facts =",
        "from tunefork.batch import Batch\n"
        "models_batch = lambda i: Batch(i, torch.ones_like(i), torch.arange(1), torch.ones(1))\nfacts =",
        1,
    )
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{source}"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
