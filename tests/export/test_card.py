"""The card tells the run's figures, and its few lines work."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.export.scenes import MakeRun, write_rows
from tunefork.export.exporting import export
from tunefork.export.snippet import STAND_IN
from tunefork.workflows.finetune import finetune
from tunefork.workflows.predict import predict


def executed(folder: Path) -> str:
    """What the card's Python prints when it runs in its folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said):
        exec(compile(code[1], "README.md", "exec"), {})
    return said.getvalue().strip()


CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama", "lora", "merged", {}),
    ("llama", "lora", "adapter", {}),
    ("llama", "qlora", "adapter", {}),
    ("llama", "qlora", "adapter", {"form": "head"}),
    ("llama", "lora", "merged", {"chat_template": True}),
    ("roberta", "lora", "merged", {}),
    ("roberta", "none", "merged", {}),
    ("bert", "lora", "adapter", {"form": "head"}),
    ("bert", "lora", "merged", {"form": "head"}),
    ("llama", "prefix", "adapter", {}),
]


@pytest.mark.parametrize(("kind", "adapter", "to", "settings"), CASES)
def test_the_lines_of_the_card_answer_as_the_run_does(
    run: MakeRun, tmp_path: Path, kind: str, adapter: str, to: str, settings: dict[str, Any]
) -> None:
    source = run(kind, adapter, **settings)
    folder = export(source, to=to, out=tmp_path / "out").path
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": STAND_IN}) + "\n")
    predicted = predict(source, tmp_path / "one.jsonl", tmp_path / "said.jsonl").path.read_text()
    assert executed(folder) == json.loads(predicted)["prediction"]


@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_the_lines_of_the_card_generate(run: MakeRun, tmp_path: Path, to: str) -> None:
    source = run("llama", "lora", task="generation")
    folder = export(source, to=to, out=tmp_path / "out").path
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": STAND_IN, "completion": "x"}) + "\n")
    predicted = predict(source, tmp_path / "one.jsonl", tmp_path / "said.jsonl").path.read_text()
    assert executed(folder) == json.loads(predicted)["prediction"].strip()


def test_the_lines_of_the_card_chat(run: MakeRun, tmp_path: Path) -> None:
    assert executed(export(run("llama", "lora", task="chat"), out=tmp_path / "out").path)


def test_the_card_tells_figures_proof_and_base(run: MakeRun, tmp_path: Path) -> None:
    source = run("llama", "lora")
    found = export(source, out=tmp_path / "out")
    card = (found.path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    result = json.loads((source / "result.json").read_text())
    accuracy = result["test"]["accuracy"]
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert front["base_model"] == Path(result["recipe"]["model"]["name"]).name
    assert "license" not in front
    assert f"{accuracy['value']:.3f} ({accuracy['low']:.3f}–{accuracy['high']:.3f})" in card  # as the report has it
    assert "It was made with Tunefork (LoRA)." in card
    assert found.proof is not None
    assert f"**{found.proof['ratio']:.2g}**" in card
    assert "License: not stated" in card
    assert f"| train | {result['data']['counts']['train']['rows']} |" in card


def test_the_card_does_not_call_a_figure_without_spread_exact(run: MakeRun, tmp_path: Path) -> None:
    source = shutil.copytree(run("llama", "lora"), tmp_path / "run")
    result = json.loads((source / "result.json").read_text())
    result["test"]["macro_f1"] |= {"value": 1.0, "low": 1.0, "high": 1.0, "n": 30}
    (source / "result.json").write_text(json.dumps(result))
    card = (export(source, to="adapter", out=tmp_path / "out").path / "README.md").read_text()
    assert "1.000 (no spread)" in card
    assert "\n`macro_f1`: no spread over resamples of 30 rows, which does not make it exact. All are right;" in card


def test_the_card_tells_the_licence_that_the_bases_card_tells(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    base = shutil.copytree(tiny("llama"), tmp_path / "base")
    recipe = {
        "task": "classification",
        "data": {"train": write_rows(tmp_path)["classification"]},
        "train": {"max_steps": 1},
        "evaluate": {"baselines": [], "bootstrap": 100},
    }

    def card(model: str, run: str) -> str:
        source = tmp_path / run
        if not source.exists():
            finetune({**recipe, "model": model, "adapter": "lora", "out": str(source)})
        return (export(source, to="adapter", out=tmp_path / "out").path / "README.md").read_text()

    assert "License of the base model: cc-by-sa-4.0" in card("embedded", "embedded-run")
    shutil.rmtree(tmp_path / "out")
    for front, says in (
        ("license: mit", "License of the base model: mit"),
        ("license: other\nlicense_name: ours", "License of the base model: ours"),
        ("license: [mit, zlib]", "License of the base model: mit, zlib"),
        ("license: [", "License: not stated"),
        ("language: en", "License: not stated"),
    ):
        (base / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
        assert says in card(str(base), "run")


def test_an_adapters_card_names_peft_and_its_base(run: MakeRun, tmp_path: Path) -> None:
    folder = export(run("llama", "qlora"), to="adapter", out=tmp_path / "out").path
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "bitsandbytes" in card
    assert "Proof of the merge" not in card
