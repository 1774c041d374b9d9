"""A merged folder says what the trained model says, to plain transformers too; or there is no folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    BitsAndBytesConfig,
)

from tests.export.scenes import MakeRun, run_maker
from tunefork.errors import ExportError
from tunefork.evaluate.trained import Trained, load_trained
from tunefork.export import exporting
from tunefork.export.exporting import export
from tunefork.export.proof import LIMIT, in_fp32
from tunefork.models import inspect_model, load_base, read_artefact_info
from tunefork.recipe import ModelSection
from tunefork.workflows.predict import predict

IDS = torch.tensor([[5, 20, 31, 7, 44, 60]])
PLAIN = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


def off(ours: torch.Tensor, trained: torch.Tensor, base: torch.Tensor) -> float:
    return float((ours - trained).norm() / (trained - base).norm())


@pytest.mark.parametrize("computed", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "qlora", "none"])
def test_a_merge_in_the_format_of_training_is_what_was_trained(
    run: MakeRun, tmp_path: Path, adapter: str, computed: str
) -> None:
    source = run("llama", adapter, computed)
    found = export(source, out=tmp_path / "merged")
    assert found.proof is not None
    assert found.proof["dtype"] == computed
    assert found.proof["split"] == "dev"
    assert ("as transformers loads it" in found.says) == (computed == "bf16")
    assert found.proof["ratio"] <= (1e-3 if computed == "fp32" else LIMIT)
    plain = AutoModelForCausalLM.from_pretrained(found.path)
    assert plain.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[computed]
    trained = load_trained(source)
    untrained = read_artefact_info(source / "model")["base"]["folder"]
    base = AutoModelForCausalLM.from_pretrained(untrained)
    assert off(logits(plain.float()), logits(in_fp32(trained.model)), logits(base)) <= LIMIT


@pytest.mark.parametrize(
    ("kind", "adapter", "settings"),
    [
        ("gpt2", "lora", {}),  # Conv1D weights lie the other way round
        ("opt", "lora", {}),
        ("qwen", "qlora", {}),  # tied embeddings
        ("gemma", "lora", {}),
        ("roberta", "lora", {}),
        ("bert", "lora", {"form": "head"}),
        ("bert", "dora", {"form": "head"}),
        ("roberta", "qlora", {"form": "head"}),
        ("llama", "head", {"form": "head"}),
        ("llama", "lora", {"form": "head"}),
        ("bert", "none", {}),
    ],
)
def test_every_kind_of_model_merges(
    run: MakeRun, tmp_path: Path, kind: str, adapter: str, settings: dict[str, str]
) -> None:
    source = run(kind, adapter, **settings)
    found = export(source, out=tmp_path / "merged")
    assert found.proof is not None
    assert found.proof["ratio"] <= 1e-3
    trained = load_trained(source)
    auto = AutoModelForSequenceClassification if settings else PLAIN[trained.facts.kind]
    plain = auto.from_pretrained(found.path)
    assert torch.allclose(logits(plain), logits(trained.model), rtol=1e-3, atol=1e-3)
    if settings:
        assert set(plain.config.id2label.values()) == {"good", "bad"}


@pytest.mark.parametrize("task", ["generation", "chat"])
def test_texts_are_proven_by_their_loss_too(run: MakeRun, tmp_path: Path, task: str) -> None:
    found = export(run("llama", "lora", task=task), out=tmp_path / "merged", dtype="bf16")
    assert found.proof is not None
    assert found.proof["positions"] > found.proof["rows"]
    assert found.proof["metrics"]["loss"]["equal"]
    assert 0 < found.proof["ratio_in_own_arithmetic"] < 1


def test_an_untouched_base_fails(run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmerged(trained: Trained, adapter_folder: Path) -> Any:
        assert isinstance(trained.model, PeftModel)
        return trained.model.unload()

    monkeypatch.setattr(exporting, "merged_model", unmerged)
    with pytest.raises(ExportError, match=r"off by 1 of what was learned.*Try --to adapter"):
        export(run("llama", "lora"), out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_qlora_merged_into_the_original_weights_fails(
    run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def original(trained: Trained, adapter_folder: Path) -> Any:
        base: Any = load_base(trained.facts, "text", (), trained.device, torch.float32)
        return PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()

    monkeypatch.setattr(exporting, "merged_model", original)
    with pytest.raises(ExportError, match=r"of what was learned, more than 0\.05"):
        export(run("llama", "qlora"), out=tmp_path / "merged")


@pytest.mark.parametrize(("adapter", "ways"), [("lora", "--dtype fp32 or --to adapter"), ("none", "--dtype fp32")])
def test_learning_that_16_bit_rounds_away_is_refused_and_fp32_keeps_it(
    run: MakeRun, tmp_path: Path, adapter: str, ways: str
) -> None:
    source = run("llama", adapter, learning_rate=3e-6)
    with pytest.raises(ExportError, match=f"In bf16 .* Nothing was written. Try {ways}.") as caught:
        export(source, out=tmp_path / "merged", dtype="bf16")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    found = export(source, out=tmp_path / "merged", dtype="fp32")
    assert found.proof is not None
    assert found.proof["ratio"] <= LIMIT


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_run_that_learned_nothing_has_no_proof(run: MakeRun, tmp_path: Path, adapter: str) -> None:
    with pytest.raises(ExportError, match="training changed something"):
        export(run("llama", adapter, learning_rate=1e-14), out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_the_merged_folder_predicts_what_the_run_predicts(run: MakeRun, tmp_path: Path) -> None:
    source = run("llama", "qlora")
    rows = json.loads((source / "result.json").read_text())["recipe"]["data"]["train"]
    merged = export(source, out=tmp_path / "merged").path
    first = predict(source, rows, tmp_path / "a.jsonl").path.read_text().splitlines()
    second = predict(merged, rows, tmp_path / "b.jsonl").path.read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in first] == [json.loads(line)["prediction"] for line in second]
    assert len(first) == 40


def test_a_plain_folder_holds_no_trace_of_adapters_or_quantisation(run: MakeRun, tmp_path: Path) -> None:
    found = export(run("llama", "qlora"), out=tmp_path / "merged")
    config = json.loads((found.path / "config.json").read_text())
    assert "quantization_config" not in config
    assert not list(found.path.glob("adapter*"))
    assert {"tunefork.json", "proof.json", "recipe.yaml", "README.md", "tokenizer.json"} <= {
        p.name for p in found.path.iterdir()
    }
    assert json.loads((found.path / "proof.json").read_text()) == json.loads(json.dumps(found.proof))
    facts = inspect_model(ModelSection(name=str(found.path)))
    assert facts.dtype_on_disk == "fp32"
    assert not facts.quantized


def test_generation_ends_where_answers_ended_in_training(run: MakeRun, tmp_path: Path) -> None:
    found = export(run("llama", "lora", task="chat"), out=tmp_path / "merged")
    settings = json.loads((found.path / "generation_config.json").read_text())
    trained = load_trained(found.path)
    assert settings["eos_token_id"] == trained.tokenizer.eos_token_id
    assert settings["pad_token_id"] == trained.tokenizer.pad_token_id
    assert (found.path / "chat_template.jinja").is_file()


def test_a_base_stored_as_nf4_becomes_plain_weights(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("stored")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(place / "nf4")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(place / "nf4")
    (place / "runs").mkdir()
    source = run_maker(place / "runs", lambda _: place / "nf4")("llama", "lora")
    found = export(source, out=place / "merged")
    assert found.proof is not None
    assert found.proof["ratio"] <= 1e-3
    assert "quantization_config" not in json.loads((found.path / "config.json").read_text())


def test_nothing_is_fetched_by_importing_this_room(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("def get_kernel(*a, **k):\n    raise SystemExit('a kernel was asked for')\n")
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    command = [sys.executable, "-c", "import tunefork.export.merge, bitsandbytes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
