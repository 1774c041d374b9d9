"""Training for a metric: what method zo raises is the task's own metric, of the predictions that a probe gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.evaluate import scenes
from tests.stopping import StopAt
from tunefork.errors import Interrupted, RecipeError, TrainingError
from tunefork.evaluate.harness import predict_examples
from tunefork.evaluate.objective import make_objective
from tunefork.recipe import Recipe, TaskSection, make_recipe
from tunefork.run import RunFolder
from tunefork.train.prepare import prepare
from tunefork.workflows import finetune
from tunefork.zo import Reader

WORDS = ("box", "screen", "film", "report")
BASE: dict[str, Any] = {"evaluate": {"baselines": []}, "adapter": "none"}


def recipe(model: Path, folder: Path, task: str | Mapping[str, Any], objective: str, **more: Any) -> Recipe:
    rows: list[dict[str, Any]] = []
    for i in range(24):
        text = f"{WORDS[i % 4]} {WORDS[i * 3 // 4 % 4]} {i}"
        row = {"text": text, "prompt": text, "completion": WORDS[i % 4], "label": str(i % 3)}
        rows.append(row if task != "choice" else {"question": text, "choices": ["good", "bad"], "label": i % 2})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"name": str(model), "device": "cpu"},
        "task": task,
        "data": {"train": str(file), "test_fraction": 0, "dev_fraction": 0.1, "max_leaked": 1, "max_conflicts": 1},
        "train": {"method": "zo", "max_steps": 6, "save_every": 2, "evaluate_every": 4},
        "zo": {"objective": objective},
        "out": str(folder / "run"),
    }
    return make_recipe({key: {**value, **more.get(key, {})} if isinstance(value, dict) else more.get(key, value)
                        for key, value in {**tree, **BASE}.items()})  # fmt: skip


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], bytes]:
    weights = {k: v for file in sorted((run / "model").glob("*.safetensors")) for k, v in load_file(file).items()}
    return weights, (run / "trajectory").read_bytes()


def steps(run: Path) -> list[dict[str, Any]]:
    return [e for e in RunFolder.open(run, write=False).read_log() if e["kind"] == "step"]


def test_a_function_of_ones_own_and_the_same_bits_after_an_interruption(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_goal.py").write_text(
        "def cost(found):\n    return -sum(abs(int(p.predicted) - int(p.gold)) + p.probabilities[0] for p in found)\n"
    )
    monkeypatch.chdir(tmp_path)
    more = {"task": {"name": "scoring", "form": "head"}, "objective": "python:my_goal:cost"}
    whole = finetune(recipe(tiny("bert"), tmp_path, **more, out=str(tmp_path / "whole")))
    part = recipe(tiny("bert"), tmp_path, **more, out=str(tmp_path / "part"))
    with pytest.raises(Interrupted):
        finetune(part, listener=StopAt(3))
    resumed = finetune(part, resume=True)
    (a, log), (b, other) = outcome(whole.path), outcome(resumed.path)
    assert log == other and all(torch.equal(a[k], b[k]) for k in a)
    assert all(s["objective"] == -s["loss"] < 0 for s in steps(whole.path))
    notes = " ".join(whole.result["train"]["notes"])
    assert "of the probes change the metric" in notes and "The objective is evaluated with" in notes
    assert whole.result["recipe"]["train"]["batch_size"] == 22  # all: it is no mean over rows


@pytest.mark.parametrize(
    ("task", "objective", "adapter"),
    [
        ({"name": "generation", "max_new_tokens": 3}, "rougeL", "none"),
        ({"name": "generation", "max_new_tokens": 3}, "exact_match", "lora"),
        ("choice", "accuracy", "none"),
        ({"name": "classification", "objective": "candidates"}, "macro_f1", "prefix"),
        ({"name": "scoring", "objective": "candidates"}, "absolute_smd", "none"),
    ],
)
def test_every_kind_of_prediction(
    tiny: Callable[[str], Path], tmp_path: Path, task: Any, objective: str, adapter: str
) -> None:
    zo = {"objective": objective, "epsilon": 0.1}
    train = {"learning_rate": 1e-3, "max_steps": 2, "batch_size": 8}
    done = finetune(recipe(tiny("llama"), tmp_path, task, objective, zo=zo, train=train, adapter=adapter))
    assert all(np.isfinite(s["objective"]) for s in steps(done.path))
    mode = (
        "more than one pass"
        if objective == "rougeL"
        else "one side of one query"
        if adapter != "none"
        else "both sides"
    )
    assert mode in done.result["train"]["notes"][-1]
    values = [s["objective"] for s in steps(done.path)]
    assert all(v <= 0 if objective == "absolute_smd" else v >= 0 for v in values)


@pytest.mark.parametrize(
    ("objective", "preset", "rows", "estimator"),
    [
        ("loss", "default", 6, "one_sided"),
        ("loss", "mezo", 16, "two_sided"),
        ("accuracy", "default", 16, "two_sided"),
        ("macro_f1", "default", 22, "two_sided"),
    ],
)
def test_a_goal_has_the_rows_and_sides_that_suit_it(
    tiny: Callable[[str], Path], tmp_path: Path, objective: str, preset: str, rows: int, estimator: str
) -> None:
    zo = {"objective": objective, "preset": preset, "epsilon": 0.1}
    train = {"learning_rate": 1e-3, "max_steps": 1}
    done = finetune(
        recipe(tiny("bert"), tmp_path, {"name": "classification", "form": "head"}, objective, zo=zo, train=train)
    )
    assert done.result["recipe"]["train"]["batch_size"] == rows
    assert done.result["recipe"]["train"]["sampling"] == ("shuffled" if preset == "mezo" else "stratified")
    assert Reader(done.path / "trajectory").header.run["options"]["estimator"] == estimator


@pytest.mark.parametrize("name", ["accuracy", "macro_f1"])
def test_answers_are_the_tasks_predictions(tiny: Callable[[str], Path], name: str) -> None:
    scene = scenes.scene(tiny("llama"), "causal", TaskSection(name="classification"), scenes.reviews())
    asking = scene.asking()
    rendered = [asking.renderer.render(e)[0] for e in scene.examples]
    objective = make_objective(name, asking, rendered)
    assert objective is not None and objective.mean == (name == "accuracy")
    places = [4, 0, 3, 1]
    batch = replace(asking.renderer.batch([rendered[i] for i in places]), places=torch.tensor(places))
    with torch.no_grad():
        found = objective.answers(scene.model, batch)
    wanted = predict_examples(scene.model, asking, [scene.examples[i] for i in places])
    assert [(p.source, p.predicted, p.gold) for p in found] == [(p.source, p.predicted, p.gold) for p in wanted]
    statistic = next(s for s in scene.task.statistics(wanted) if s.name == name)
    assert objective.value(found) == statistic(np.arange(4))
    assert make_objective("loss", asking, rendered) is None


@pytest.mark.parametrize(
    ("task", "objective", "method", "says"),
    [
        ("classification", "accuracy", "backprop", "has none. Received method backprop"),
        ("classification", "acuracy", "zo", "Did you mean"),
        ("classification", "qwk", "zo", "must be one of accuracy"),
        ({"name": "generation"}, "accuracy", "zo", "Received 'accuracy'"),
        ("classification", "python:no_such_module:f", "zo", "No module named"),
        ("classification", "python:json:decoders", "zo", "json"),
        ("classification", "python:json:__doc__", "zo", "which is a str"),
        ({"name": "classification", "objective": "answer"}, "accuracy", "zo", "task.objective=candidates"),
    ],
)
def test_what_cannot_be_raised_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path, task: Any, objective: str, method: str, says: str
) -> None:
    with pytest.raises(RecipeError, match=says) as refused:
        prepare(recipe(tiny("llama"), tmp_path, task, objective, train={"method": method}))
    assert "Received" in str(refused.value)


FAULTY = """
def divides(found): return 1 / 0
def nothing(found): pass
def text(found): return "0.5"
def undefined(found): return float("nan")
def misspelt(found): return sum(p.label == p.gold for p in found)
def varied(found): return len({p.predicted for p in found}) / len({p.gold for p in found} - {None, ""})
calls = []
def later(found):
    calls.append(found)
    return None if len(calls) > 3 else 1.0
"""


@pytest.mark.parametrize("task", ["classification", "generation"])
@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (
            "divides",
            r"Received ZeroDivisionError: division by zero \(.*faulty_goals.py, line 2\) from python:faulty_goals",
        ),
        ("nothing", "Received None from python:faulty_goals:nothing"),
        ("text", "Received '0.5' from"),
        ("undefined", "Received nan from"),
        ("misspelt", "AttributeError: 'Prediction' object has no attribute 'label'"),
        ("missing", "AttributeError: module 'faulty_goals' has no attribute 'missing'"),
        ("", "Received 'python:faulty_goals'. Try python:faulty_goals:cost"),
        ("varied", ""),
    ],
)
def test_the_faults_of_a_function_are_known_before_a_model_is_loaded(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, objective: str, says: str
) -> None:
    (tmp_path / "faulty_goals.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "faulty_goals", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    given = recipe(tiny("llama"), tmp_path, task, f"python:faulty_goals:{objective}".removesuffix(":"))
    if not says:
        prepare(given)  # made-up answers differ from each other, as a model's do
        return
    with pytest.raises(RecipeError, match=says) as refused:
        prepare(given)
    assert str(refused.value).startswith("`zo.objective` must ") and "Try" in str(refused.value)


def test_a_function_that_fails_later_is_named(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "later_goals.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match="must give a finite number") as failed:
        finetune(recipe(tiny("bert"), tmp_path, {"name": "scoring", "form": "head"}, "python:later_goals:later"))
    assert "Received None from python:later_goals:later. Try" in str(failed.value)


def test_no_answer_ever_changes(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flat_goal.py").write_text("def same(found):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="no answer changes up to epsilon") as refused:
        finetune(recipe(tiny("bert"), tmp_path, {"name": "scoring", "form": "head"}, "python:flat_goal:same"))
    assert "Try" in str(refused.value)
