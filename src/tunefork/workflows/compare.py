"""Methods and baselines on one task in one table, each in a process of its own, so that its memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from tunefork.errors import RecipeError, RunError, TuneforkError, UnsupportedError, did_you_mean
from tunefork.evaluate import compare_predictions
from tunefork.evaluate.stored import read_predictions
from tunefork.files import make_folder, write_json
from tunefork.methods import method_info
from tunefork.models import check_support
from tunefork.recipe import Recipe
from tunefork.recipe.schema import AdapterName
from tunefork.train.prepare import prepare, refuse_errors
from tunefork.workflows.finetune import as_recipe, free_folder

COMPARISON_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table: a baseline, or a method with an adapter."""

    name: str  # "tfidf", "lora", "backprop/lora"
    kind: str  # "baseline" or "trained"
    metrics: Mapping[str, Mapping[str, Any]]
    seconds: float
    peak_memory_bytes: int | None
    against_best_baseline: Mapping[str, Any] | None  # difference, low, high, p_value of the choosing metric
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The table, and the folder with every cell's run."""

    path: Path
    metric: str
    cells: Sequence[Cell]

    def as_dict(self) -> dict[str, Any]:
        return {"schema": COMPARISON_SCHEMA, "metric": self.metric, "cells": [asdict(cell) for cell in self.cells]}


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    methods: Sequence[str] | None = None,
    *,
    on_cell: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Runs every baseline that fits the task, and every method in `methods`, on the same rows.

    A method is `adapter` or `method/adapter`: `lora`, `backprop/none`. By default: every adapter this model and
    task support with the recipe's method. A cell that fails keeps its place, with the sentence that says why.
    """
    recipe = as_recipe(recipe)
    if methods is not None and not methods:
        raise RecipeError("`methods` must name at least one. Received none. Try --methods lora,none.")
    trained = {name: _changes(recipe, name) for name in methods or ()}  # wrong names are refused before anything runs
    folder = Path(recipe.out) if recipe.out is not None else free_folder(recipe)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"A comparison needs an empty folder. Received {folder}, which is not. Try another --out.")
    job = prepare(recipe)
    refuse_errors(job.findings)
    make_folder(folder)
    if methods is None:
        trained = {name: _changes(recipe, name) for name in _supported(recipe, job)}
    cells: list[Cell] = []
    for baseline in job.recipe.evaluate.baselines:
        on_cell(baseline)
        cells.append(_cell(folder, baseline, recipe.model_dump(mode="json"), baseline))
    for name, tree in trained.items():
        on_cell(name)
        cells.append(_cell(folder, name, tree, None))
    cells = _against_best_baseline(job, cells, folder, recipe)
    comparison = Comparison(folder, job.task.metric, cells)
    write_json(folder / "comparison.json", comparison.as_dict())
    return comparison


def _supported(recipe: Recipe, job: Any) -> list[str]:
    """Adapters that the recipe's method, model and task allow, by name."""
    found = []
    for adapter in method_info(recipe.train.method).adapters:
        try:
            check_support(job.facts, cast(AdapterName, adapter), job.task.form, recipe.train.method)
        except UnsupportedError:
            continue
        found.append(adapter)
    return found


def _changes(recipe: Recipe, name: str) -> dict[str, Any]:
    """The recipe with the method and adapter that `name` stands for, and no baselines of its own."""
    method, _, adapter = name.rpartition("/")
    method = method or recipe.train.method
    allowed = method_info(method).adapters
    if adapter not in allowed:
        raise RecipeError(
            f"A method must be an adapter, or METHOD/ADAPTER, with an adapter of {', '.join(allowed)}. "
            f"Received {name!r}.{did_you_mean(adapter, allowed) or ' Try lora.'}"
        )
    tree = recipe.model_dump(mode="json")
    tree["train"]["method"], tree["adapter"]["name"], tree["evaluate"]["baselines"] = method, adapter, []
    return tree


def _cell(folder: Path, name: str, tree: Mapping[str, Any], baseline: str | None) -> Cell:
    """Runs one cell in a fresh process and reads what it left behind."""
    at = folder / "cells" / name.replace("/", "-")
    at.parent.mkdir(exist_ok=True)
    kind = "trained" if baseline is None else "baseline"
    spec = {"recipe": {**tree, "out": str(at)}, "baseline": baseline}
    done = subprocess.run(
        [sys.executable, "-m", "tunefork.workflows.cell"],
        input=json.dumps(spec),
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        if done.returncode not in (TuneforkError.exit_code, 2):
            (folder / f"{at.name}.error.log").write_text(done.stderr)
            why += f" (see {at.name}.error.log)"
        return Cell(name, kind, {}, 0.0, None, None, why)
    found = json.loads(done.stdout)
    return Cell(name, kind, found["metrics"], found["seconds"], found["peak_memory_bytes"], None)


def _against_best_baseline(job: Any, cells: Sequence[Cell], folder: Path, recipe: Recipe) -> list[Cell]:
    """Adds to every trained cell the paired difference to the baseline with the best choosing metric."""
    metric = job.task.metric
    baselines = [c for c in cells if c.kind == "baseline" and metric in c.metrics]
    if not baselines:
        return list(cells)
    sign = -1.0 if metric == "loss" else 1.0
    best = max(baselines, key=lambda c: sign * c.metrics[metric]["value"])
    theirs = read_predictions(folder / "cells" / best.name / "predictions" / "test.jsonl")
    section, compared = job.recipe.evaluate, []
    for cell in cells:
        if cell.kind == "trained" and cell.error is None and metric in cell.metrics:
            ours = read_predictions(folder / "cells" / cell.name.replace("/", "-") / "predictions" / "test.jsonl")
            difference = compare_predictions(job.task, ours, theirs, section, recipe.seed)[metric]
            cell = replace(cell, against_best_baseline={"baseline": best.name, **asdict(difference)})
        compared.append(cell)
    return compared
