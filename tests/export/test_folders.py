"""What an export refuses, where it writes, and the adapter's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.export.scenes import MakeRun
from tunefork.errors import MissingFileError, RecipeError, RunError, UnsupportedError
from tunefork.evaluate.trained import load_trained
from tunefork.export.exporting import export

IDS = torch.tensor([[5, 20, 31, 7, 44, 60]])


@pytest.mark.parametrize("adapter", ["lora", "dora", "prefix"])
def test_the_adapter_loads_in_plain_peft(run: MakeRun, tmp_path: Path, adapter: str) -> None:
    source = run("llama", adapter)
    found = export(source, to="adapter", out=tmp_path / "adapter")
    assert found.proof is None
    base = json.loads((found.path / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), found.path).eval()
    with torch.inference_mode():
        assert torch.equal(plain(input_ids=IDS).logits, load_trained(source).model(input_ids=IDS).logits)
        again = load_trained(found.path)
        assert torch.equal(plain(input_ids=IDS).logits, again.model(input_ids=IDS).logits)


def test_a_prefix_cannot_be_merged(run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"prefix cannot be merged.*Try --to adapter") as caught:
        export(run("llama", "prefix"), out=tmp_path / "merged")
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "adapter", "form"), [("llama", "none", "auto"), ("llama", "head", "head")])
def test_a_whole_model_has_no_adapter_to_export(
    run: MakeRun, tmp_path: Path, kind: str, adapter: str, form: str
) -> None:
    settings = {} if form == "auto" else {"form": form}
    with pytest.raises(UnsupportedError, match=r"Try --to merged"):
        export(run(kind, adapter, **settings), to="adapter", out=tmp_path / "adapter")


def test_what_is_not_offered_is_refused_by_name(run: MakeRun, tmp_path: Path) -> None:
    source = run("llama", "lora")
    with pytest.raises(RecipeError, match="Did you mean `merged`"):
        export(source, to="merge", out=tmp_path / "x")
    with pytest.raises(RecipeError, match=r"`dtype` must be one of auto, fp32, bf16, fp16\. Received 'int8'"):
        export(source, dtype="int8", out=tmp_path / "x")
    with pytest.raises(RecipeError, match="that of merged weights"):
        export(source, to="adapter", dtype="bf16", out=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_only_a_finished_run_is_exported(run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        export(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"must hold recipe\.yaml"):
        export(tmp_path)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run("llama", "lora"), unfinished)
    (unfinished / "result.json").unlink()
    with pytest.raises(RunError, match="must be a finished run"):
        export(unfinished)


def test_a_folder_with_other_things_is_left_alone(run: MakeRun, tmp_path: Path) -> None:
    source = run("llama", "lora")
    (tmp_path / "novel.txt").write_text("Chapter 1")
    for target in (tmp_path, tmp_path / "novel.txt", source, source / "model"):
        with pytest.raises(RunError, match="a folder of its own"):
            export(source, out=target)
    assert (tmp_path / "novel.txt").read_text() == "Chapter 1"


def test_an_earlier_export_is_replaced_where_a_run_keeps_its_own(run: MakeRun, tmp_path: Path) -> None:
    mine = tmp_path / "run"
    shutil.copytree(run("llama", "lora"), mine)
    first = export(mine)
    assert first.path == mine / "export-merged"
    (first.path / "old").touch()
    second = export(mine, dtype="bf16")
    assert second.path == first.path
    assert not (second.path / "old").exists()
    assert sorted(p.name for p in mine.iterdir() if p.name.startswith(".")) == [".lock"]


def test_rows_that_are_gone_are_named(run: MakeRun, tmp_path: Path) -> None:
    mine = tmp_path / "run"
    shutil.copytree(run("llama", "lora"), mine)
    recipe = (mine / "recipe.yaml").read_text()
    (mine / "recipe.yaml").write_text(recipe.replace("labelled.csv", "gone.csv"))
    with pytest.raises(MissingFileError, match=r"gone\.csv"):
        export(mine)
    assert not (mine / "export-merged").exists()
