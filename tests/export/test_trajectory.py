"""A zeroth-order run as base + trajectory: what is replayed is what was trained, and anything else is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.export.scenes import write_rows
from tests.export.test_card import executed
from tests.tiny import adapter_section
from tunefork.errors import MissingFileError, RecipeError, RunError, TuneforkError, UnsupportedError
from tunefork.evaluate.trained import load_trained
from tunefork.export.exporting import export
from tunefork.export.snippet import STAND_IN
from tunefork.recipe import make_recipe
from tunefork.workflows import evaluate, finetune, predict, replay
from tunefork.zo import ZO, Reader

IDS = torch.tensor([[5, 20, 31, 7, 44, 60]])
STEPS = 12


class Case(NamedTuple):
    kind: str = "llama"
    adapter: str = "none"
    form: str = "auto"
    dtype: str = "fp32"
    direction: str | None = None


BESIDE, DENSE = Case(), Case(dtype="bf16", direction="rademacher")
CASES = [
    BESIDE,
    DENSE,
    Case("bert", form="head"),
    Case("llama", form="head", dtype="bf16"),
    Case("llama", "lora"),
    Case("roberta", "head", "head"),
    Case("llama", "prefix", dtype="bf16"),
    Case("gpt2", "qlora"),
    Case("llama", "qlora", direction="rademacher"),
]
Trained = Callable[..., Path]


@pytest.fixture(scope="session")
def zo_run(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run of the method zo; never write into it."""
    folder = tmp_path_factory.mktemp("zo")
    rows, made = write_rows(folder)["classification"], dict[Case, Path]()

    def run(case: Case) -> Path:
        if case not in made:
            recipe: dict[str, Any] = {
                "model": {"name": str(tiny(case.kind)), "dtype": case.dtype, "max_length": 64},
                "task": {"name": "classification", "form": case.form},
                "data": {"train": rows, "test_fraction": 0.2, "dev_fraction": 0.3},
                "adapter": adapter_section(case.adapter, "zo"),
                "train": {"method": "zo", "learning_rate": 1e-3, "max_steps": STEPS, "batch_size": 8, "save_every": 4},
                "zo": {"epsilon": 1e-3, "direction": case.direction, "queries": 2},
                "evaluate": {"baselines": [], "bootstrap": 100},
                "out": str(folder / f"run-{len(made)}"),
            }
            made[case] = finetune(make_recipe(recipe)).path
        return made[case]

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    mine, theirs = weights(a), weights(b)
    return mine.keys() == theirs.keys() and all(
        t.dtype == theirs[n].dtype and torch.equal(t, theirs[n]) for n, t in mine.items()
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x) for x in case))
def test_what_is_shipped_gives_the_trained_model(
    case: Case, zo_run: Trained, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = zo_run(case)
    found = export(run, to="trajectory", out=tmp_path / "shipped")
    assert sorted(p.name for p in found.path.iterdir()) == ["README.md", "recipe.yaml", "trajectory"]
    assert found.proof is not None and found.proof["bitwise"] is True
    base = shutil.copytree(tiny(case.kind), tmp_path / "base elsewhere")
    alone = shutil.copy(found.path / "trajectory", tmp_path / "one file")
    for trajectory, out in ((found.path, "a"), (alone, "b")):
        again = replay(base, trajectory, tmp_path / out)
        kept = json.loads((run / "result.json").read_text())["train"]["weights_from_step"]
        assert (again.step, again.steps, again.from_step) == (kept, kept, 0)
        assert same(again.path, run / "model")
    rows = write_rows(tmp_path)["classification"]
    seen, trained = evaluate(tmp_path / "a", rows), evaluate(run, rows)
    assert seen.predictions == trained.predictions
    assert predict(tmp_path / "b", rows, tmp_path / "said.csv").predicted == len(seen.predictions)


@pytest.mark.parametrize("case", [BESIDE, DENSE], ids=["beside", "dense"])
def test_a_run_is_replayed_to_any_step_with_its_checkpoints_or_without(
    case: Case, zo_run: Trained, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = shutil.copytree(zo_run(case), tmp_path / "run")
    last = replay(tiny(case.kind), run, tmp_path / "last", step=STEPS)
    assert last.from_step == STEPS
    (run / "checkpoints" / f"step-{STEPS:08}" / "weights.safetensors").write_bytes(b"damaged")
    before = replay(tiny(case.kind), run / "trajectory", tmp_path / "before", step=STEPS)
    assert 0 < before.from_step < STEPS
    shutil.rmtree(run / "checkpoints")
    whole = replay(tiny(case.kind), run, tmp_path / "whole", step=STEPS)
    assert whole.from_step == 0
    assert same(last.path, before.path) and same(last.path, whole.path)
    replay(tiny(case.kind), run, tmp_path / "first", step=0)
    assert not same(tmp_path / "first", last.path)
    assert same(replay(tiny(case.kind), run, tmp_path / "kept").path, run / "model")


def test_a_run_that_is_not_finished_is_replayed(zo_run: Trained, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    run = shutil.copytree(zo_run(BESIDE), tmp_path / "run")
    for name in ("model", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "result.json").unlink()
    whole = (run / "trajectory").read_bytes()
    (run / "trajectory").write_bytes(whole[:-5])
    found = replay(tiny("llama"), run, tmp_path / "out")
    assert (found.step, found.steps) == (STEPS - 1, STEPS - 1)
    assert found.torn_bytes == Reader(zo_run(BESIDE) / "trajectory").header.size(STEPS - 1) - 5
    assert (run / "trajectory").read_bytes() == whole[:-5], "what is replayed is only read"
    assert same(found.path, replay(tiny("llama"), zo_run(BESIDE), tmp_path / "same", step=STEPS - 1).path)


def test_the_adapter_of_a_zo_run_says_in_plain_peft_what_was_trained(
    zo_run: Trained, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run = zo_run(BESIDE)
    found = export(run, to="adapter", out=tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    with torch.inference_mode(), ZO.from_trajectory(base, run / "trajectory", _kept(run)):
        trained = base(input_ids=IDS).logits
    with torch.inference_mode():
        untrained = base(input_ids=IDS).logits
        plain = PeftModel.from_pretrained(base, found.path).eval()(input_ids=IDS).logits
    assert float((plain - trained).abs().max()) < 1e-5 < 1e-3 < float((untrained - trained).abs().max())


def _kept(run: Path) -> int:
    return int(json.loads((run / "result.json").read_text())["train"]["weights_from_step"])


def test_what_cannot_be_replayed_is_refused(zo_run: Trained, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    run, llama = zo_run(BESIDE), tiny("llama")

    def refusal(base: Path, trajectory: Path, kind: type[Exception] = RunError, step: int | None = None) -> str:
        with pytest.raises(kind) as caught:
            replay(base, trajectory, tmp_path / "out", step=step)
        assert not (tmp_path / "out").exists()
        assert "Received" in str(caught.value) or "Try" in str(caught.value)
        return str(caught.value)

    assert "needs the model it was trained on" in refusal(tiny("gpt2"), run)
    assert f"from 0 to {STEPS}, the steps" in refusal(llama, run, step=STEPS + 1)
    refusal(llama, tmp_path / "nothing", MissingFileError)
    refusal(tmp_path / "nothing", run, MissingFileError)
    refusal(llama, llama, MissingFileError)
    assert "must begin with TFZOTRAJ" in refusal(llama, llama / "config.json")
    data = bytearray((run / "trajectory").read_bytes())
    data[-100] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    assert "is damaged" in refusal(llama, tmp_path / "damaged")
    alone = AutoModelForCausalLM.from_pretrained(llama)
    with ZO(alone, trajectory=tmp_path / "alone") as opt:
        opt.step(lambda: alone(input_ids=IDS, labels=IDS).loss)
    assert "written by the optimizer alone" in refusal(llama, tmp_path / "alone")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "novel.txt").write_text("Chapter 1")
    with pytest.raises(RunError, match="needs an empty folder"):
        replay(llama, run, tmp_path / "full")


def test_another_tokenizer_is_refused(zo_run: Trained, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    other = shutil.copytree(tiny("llama"), tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny("qwen") / name, other / name)
    said: list[str] = []
    with pytest.raises(RunError, match="the tokenizer it was trained with"):
        replay(other, zo_run(BESIDE), tmp_path / "out", on_stage=said.append)
    assert said == [], "what is refused is not announced"


def test_a_file_cannot_ask_for_the_code_of_its_base_to_run(
    zo_run: Trained, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    header = Reader(zo_run(BESIDE) / "trajectory").header
    about = {**header.about, "base": {**header.about["base"], "trust_remote_code": True}}
    (tmp_path / "crafted").write_bytes(replace(header, about=about).encode())
    base = shutil.copytree(tiny("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Own"}}))
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedError, match="only where that is asked for"):
        replay(base, tmp_path / "crafted", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_only_a_zo_run_has_a_trajectory_and_only_linear_changes_an_adapter(
    zo_run: Trained, run: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="Only the method zo logs a trajectory"):
        export(run("llama", "lora"), to="trajectory", out=tmp_path / "x")
    with pytest.raises(UnsupportedError, match=r"keeps the whole model\. Try --to merged"):
        export(zo_run(DENSE), to="adapter", out=tmp_path / "x")
    with pytest.raises(RecipeError, match="`dtype` is that of merged weights"):
        export(zo_run(BESIDE), to="trajectory", dtype="bf16", out=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_trajectory_is_no_model_and_is_replaced_by_the_next(zo_run: Trained, tmp_path: Path) -> None:
    for _ in range(2):
        export(zo_run(BESIDE), to="trajectory", out=tmp_path / "shipped")
    with pytest.raises(RunError, match="tunefork replay BASE"):
        load_trained(tmp_path / "shipped")
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert "tunefork replay " in card and " . -o model" in card
    (tmp_path / "shipped" / "more").touch()
    with pytest.raises(RunError, match="a folder of its own"):
        export(zo_run(BESIDE), to="trajectory", out=tmp_path / "shipped")


@pytest.mark.parametrize("case", [BESIDE, DENSE, CASES[2]], ids=["beside", "dense", "head"])
def test_the_lines_of_its_card_answer_as_the_run_does(case: Case, zo_run: Trained, tmp_path: Path) -> None:
    run = zo_run(case)
    shipped = export(run, to="trajectory", out=tmp_path / "shipped").path
    command = re.search(r"```sh\ntunefork replay (\S+) \. -o model\n```", (shipped / "README.md").read_text())
    assert command is not None
    replay(command[1], shipped, shipped / "model")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": STAND_IN}) + "\n")
    predicted = predict(run, tmp_path / "one.jsonl", tmp_path / "said.jsonl").path.read_text()
    assert executed(shipped) == json.loads(predicted)["prediction"]


def test_the_embedded_model_is_named_by_its_name(tmp_path: Path) -> None:
    recipe = {
        "model": {"name": "embedded", "max_length": 64},
        "task": "classification",
        "data": {"train": write_rows(tmp_path)["classification"], "test_fraction": 0.2, "dev_fraction": 0.3},
        "adapter": "none",
        "train": {"method": "zo", "max_steps": 1, "batch_size": 4},
        "zo": {"queries": 1, "calibrate": False},
        "evaluate": {"baselines": [], "bootstrap": 100},
        "out": str(tmp_path / "run"),
    }
    shipped = export(finetune(make_recipe(recipe)).path, to="trajectory", out=tmp_path / "shipped").path
    assert "tunefork replay embedded . -o model" in (shipped / "README.md").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"base": None},
        {"base": {}},
        {"rendering": {}},
        {"rendering": None},
        {"recipe": []},
        {"recipe": {"train": 3}},
        {"base": {"name": 3}},
        lambda about: {"rendering": {**about["rendering"], "dtype": "int4"}},
        lambda about: {"rendering": {**about["rendering"], "task": {"name": 7}}},
        lambda about: {"rendering": {**about["rendering"], "rendering": {}}},
    ],
)
def test_a_header_that_says_nonsense_of_its_run_is_refused(change: Any, zo_run: Trained, tmp_path: Path) -> None:
    header = Reader(zo_run(BESIDE) / "trajectory").header
    about = {**header.about, **(change(header.about) if callable(change) else change)}
    (tmp_path / "crafted").write_bytes(replace(header, about=about).encode())
    said: list[str] = []
    with pytest.raises(TuneforkError):
        replay(header.about["base"]["folder"], tmp_path / "crafted", tmp_path / "out", on_stage=said.append)
    assert said == [] and not (tmp_path / "out").exists()


def test_a_run_begins_with_the_header_that_says_so(zo_run: Trained) -> None:
    plain, head = (Reader(zo_run(case) / "trajectory") for case in (BESIDE, CASES[2]))
    assert plain.start() == {}
    assert {name.split(".")[0] for name in head.start()} == {"bert", "classifier"}, "a fresh pooler too"
    for reader in (plain, head):
        assert reader.header.run.keys() >= {"base", "recipe", "options", "seed", "parameters"}
        assert reader.header.about["recipe"]["train"]["method"] == "zo"
