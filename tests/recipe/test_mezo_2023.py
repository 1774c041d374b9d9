"""recipes/mezo_2023 offline: each file says its whole protocol, and trains a tiny model of its kind as MeZO does."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import SENTENCES, tiny_model
from tunefork.recipe import Recipe, load_recipe
from tunefork.workflows.finetune import finetune, plan_run
from tunefork.zo import Reader

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "mezo_2023"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


@pytest.fixture
def model(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny model of the recipe's architecture."""
    words = [*SENTENCES, *["It was terrible. It was great."] * 9]  # a verbalizer of RoBERTa is one token
    roberta = name.startswith("roberta")
    return tiny_model("roberta", tmp_path / "model", vocab_texts=words) if roberta else tiny("opt")


def on_tiny(name: str, model: Path, folder: Path, rows: int) -> Recipe:
    """The file's recipe on a tiny model and rows of two labels."""
    for file in ("train", "test"):
        with (folder / f"{file}.csv").open("w", newline="") as out:
            some = [(f"film {file} {i} was {('bad', 'good')[i % 2]}", i % 2) for i in range(rows)]
            csv.writer(out).writerows([("sentence", "label"), *some])
    given = load_recipe(FOLDER / name)
    data = {"train": str(folder / "train.csv"), "test": str(folder / "test.csv")}
    tiny = given.model.model_copy(update={"name": str(model), "dtype": "fp32", "device": "cpu"})
    return given.model_copy(update={"model": tiny, "data": given.data.model_copy(update=data)})


def planned(name: str, model: Path, folder: Path, rows: int) -> tuple[Recipe, Recipe, dict[str, int]]:
    """(the file's recipe, the same as it would run, rows of each split)."""
    given, plan = load_recipe(FOLDER / name), plan_run(on_tiny(name, model, folder, rows))
    assert not [f for f in plan.job.findings if f.level == "error"]
    assert plan.forecast.memory_bytes > 0 and plan.job.resolved.steps == given.train.max_steps
    return given, plan.job.recipe, {split: len(found) for split, found in plan.job.rows.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_is_planned_as_the_paper_trained(name: str, model: Path, tmp_path: Path) -> None:
    roberta = name.startswith("roberta")
    each = int(re.sub(r"\D", "", name)) if roberta else 0
    given, run, rows = planned(name, model, tmp_path, 11_000 if each > 100 else 1600)
    assert given.model.name == ("FacebookAI/roberta-large" if roberta else "facebook/opt-13b")
    assert (run.zo.preset, run.zo.calibrate, run.train.schedule, run.train.warmup) == ("mezo", False, "constant", 0)
    assert (run.train.batch_size, run.train.max_steps) == ((64, 100_000) if roberta else (16, 20_000))
    assert (run.train.learning_rate, run.zo.epsilon) == (given.train.learning_rate, given.zo.epsilon)
    parts = (2 * each, 2 * each, 1000) if roberta else (1000, 500, 1000)
    assert (rows["train"], rows["dev"], rows["test"]) == parts
    adapter = {"opt_lora.yaml": "lora", "opt_prefix.yaml": "prefix"}.get(name, "none")
    assert run.adapter.name == adapter


@pytest.mark.parametrize("name", FILES)
def test_steps_of_a_recipe_are_those_of_mezo(name: str, model: Path, tmp_path: Path) -> None:
    recipe = on_tiny(name, model, tmp_path, 60)
    few = {"train_rows": 24, "dev_rows": 8, "test_rows": 8, "rows_per_label": None, "dev_fraction": 0.3}
    parts = {
        "data": recipe.data.model_copy(update=few | {"max_leaked": 1.0}),
        "train": recipe.train.model_copy(update={"batch_size": 8, "max_steps": 3}),
        "evaluate": recipe.evaluate.model_copy(update={"baselines": (), "bootstrap": 100}),
        "out": str(tmp_path / "run"),
    }
    run = finetune(recipe.model_copy(update=parts))
    log = Reader(run.path / "trajectory")
    assert (log.steps, log.header.queries, log.header.run["options"]["direction"]) == (3, 1, "gaussian")
    for record in log.records():
        (term,) = record.terms
        assert term.coefficient == pytest.approx(-recipe.train.learning_rate * float(record.gradients[0]), rel=1e-6)
        assert math.isfinite(term.coefficient) and term.coefficient != 0
    assert run.result["steps"] == 3


def test_the_page_lists_every_recipe_with_its_grid() -> None:
    listed = re.findall(r"^\| `(\w+\.yaml)` .* \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == FILES
