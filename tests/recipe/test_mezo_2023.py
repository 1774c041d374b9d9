"""recipes/mezo_2023 is planned offline: each file says its whole protocol, and its models are OPT and RoBERTa."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import SENTENCES, tiny_model
from tunefork.recipe import Recipe, load_recipe
from tunefork.workflows.finetune import plan_run

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "mezo_2023"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def planned(name: str, model: Path, folder: Path, rows: int) -> tuple[Recipe, Recipe, dict[str, int]]:
    """(the file's recipe, the same as it would run, rows of each split) on a tiny model and rows of two labels."""
    for file in ("train", "test"):
        with (folder / f"{file}.csv").open("w", newline="") as out:
            some = [(f"film {file} {i} was {('bad', 'good')[i % 2]}", i % 2) for i in range(rows)]
            csv.writer(out).writerows([("sentence", "label"), *some])
    given = load_recipe(FOLDER / name)
    data = {"train": str(folder / "train.csv"), "test": str(folder / "test.csv")}
    tiny = given.model.model_copy(update={"name": str(model), "dtype": "fp32", "device": "cpu"})
    recipe = given.model_copy(update={"model": tiny, "data": given.data.model_copy(update=data)})
    plan = plan_run(recipe)
    assert not [f for f in plan.job.findings if f.level == "error"]
    assert plan.forecast.memory_bytes > 0 and plan.job.resolved.steps == given.train.max_steps
    return given, plan.job.recipe, {split: len(found) for split, found in plan.job.rows.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_is_planned_as_the_paper_trained(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    roberta = name.startswith("roberta")
    each = int(re.sub(r"\D", "", name)) if roberta else 0
    words = [*SENTENCES, *["It was terrible. It was great."] * 9]  # a verbalizer of RoBERTa is one token
    model = tiny_model("roberta", tmp_path / "model", vocab_texts=words) if roberta else tiny("opt")
    given, run, rows = planned(name, model, tmp_path, 11_000 if each > 100 else 1600)
    assert given.model.name == ("FacebookAI/roberta-large" if roberta else "facebook/opt-13b")
    assert (run.zo.preset, run.zo.calibrate, run.train.schedule, run.train.warmup) == ("mezo", False, "constant", 0)
    assert (run.train.batch_size, run.train.max_steps) == ((64, 100_000) if roberta else (16, 20_000))
    assert (run.train.learning_rate, run.zo.epsilon) == (given.train.learning_rate, given.zo.epsilon)
    parts = (2 * each, 2 * each, 1000) if roberta else (1000, 500, 1000)
    assert (rows["train"], rows["dev"], rows["test"]) == parts
    adapter = {"opt_lora.yaml": "lora", "opt_prefix.yaml": "prefix"}.get(name, "none")
    assert run.adapter.name == adapter


def test_the_page_lists_every_recipe_with_its_grid() -> None:
    listed = re.findall(r"^\| `(\w+\.yaml)` .* \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == FILES
