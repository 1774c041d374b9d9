"""Methods and baselines on one task in one table, each in a process of its own, so that its memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from tunefork.errors import RecipeError, RunError, TuneforkError, UnsupportedError, did_you_mean
from tunefork.evaluate.stored import read_predictions
from tunefork.evaluate.summary import compare_predictions
from tunefork.files import make_folder, write_json
from tunefork.methods import method_info
from tunefork.metrics import Paired
from tunefork.models import check_support
from tunefork.recipe import Recipe
from tunefork.recipe.schema import AdapterName, AdapterSection, TrainSection, ZoSection
from tunefork.tasks import Prediction
from tunefork.train.prepare import Job, prepare, refuse_errors
from tunefork.workflows.advice import Advice, Cell, advise
from tunefork.workflows.finetune import as_recipe, free_folder

COMPARISON_SCHEMA = 1
_OF_A_METHOD = ("learning_rate", "betas", "adam_epsilon", "max_grad_norm", "activation_checkpointing")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The table, the folder with every cell's run, and where zo stands beside back-propagation, which to take."""

    path: Path
    metric: str
    cells: Sequence[Cell]
    advice: Advice | None = None

    def as_dict(self) -> dict[str, Any]:
        cells, advice = [asdict(cell) for cell in self.cells], None if self.advice is None else asdict(self.advice)
        return {"schema": COMPARISON_SCHEMA, "metric": self.metric, "cells": cells, "advice": advice}


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    methods: Sequence[str] | None = None,
    *,
    memory_limit: int | None = None,
    on_cell: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Runs every baseline that fits the task, and every method in `methods`, on the same rows.

    A method is `adapter` or `method/adapter`: `lora`, `backprop/none`. By default: every adapter this model and
    task support with the recipe's method, and beside zo `backprop/lora`. A cell that fails keeps its place, with the
    sentence that says why. Settings that the recipe gives for its own method alone are automatic for others, and
    beside zo back-propagation recomputes activations, which is the least memory that it takes.

    memory_limit: bytes. Micro-batches are made smaller until the forecast keeps to it, and what was measured above it
        is not advised.
    """
    recipe = as_recipe(recipe)
    if methods is not None and not methods:
        raise RecipeError("`methods` must name at least one. Received none. Try --methods lora,none.")
    trained = {name: _changes(recipe, name) for name in methods or ()}  # wrong names are refused before anything runs
    folder = Path(recipe.out) if recipe.out is not None else free_folder(recipe)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"A comparison needs an empty folder. Received {folder}, which is not. Try another --out.")
    bare = recipe.model_copy(update={"adapter": AdapterSection(name=recipe.adapter.name)})  # a cell reads the rest
    job = prepare(bare)
    refuse_errors(job.findings)
    make_folder(folder)
    if methods is None:
        beside = ["backprop/qlora" if job.facts.quantized else "backprop/lora"]
        names = [*_supported(recipe, job), *(beside if recipe.train.method == "zo" else [])]
        trained = {name: _changes(recipe, name) for name in names}
    if any(tree["train"]["method"] == "zo" for tree in trained.values()):
        for tree in trained.values():
            _recompute_activations(tree, job)
    cells: list[Cell] = []
    for baseline in job.recipe.evaluate.baselines:
        on_cell(baseline)
        cells.append(_cell(folder, baseline, bare.model_dump(mode="json"), baseline, None))
    for name, tree in trained.items():
        on_cell(name)
        cells.append(_cell(folder, name, tree, None, memory_limit))
    cells = _against_best_baseline(job, cells, folder, recipe)
    metric = job.task.metric

    def paired(a: Cell, b: Cell) -> Paired:
        ours, theirs = (_predictions(folder, cell.name) for cell in (a, b))
        return compare_predictions(job.task, ours, theirs, job.recipe.evaluate, recipe.seed)[metric]

    comparison = Comparison(folder, metric, cells, advise(metric, cells, memory_limit, paired))
    write_json(folder / "comparison.json", comparison.as_dict())
    return comparison


def _supported(recipe: Recipe, job: Job) -> list[str]:
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
    if method != recipe.train.method:
        tree["zo"] = ZoSection().model_dump(mode="json")
        tree["train"] |= TrainSection().model_dump(mode="json", include=set(_OF_A_METHOD))
    read = {"prefix_tokens"} if adapter == "prefix" else set[str]()
    if adapter in ("lora", "dora", "qlora"):
        read = {"rank", "alpha", "dropout", "targets"}
    tree["adapter"] = {key: value for key, value in tree["adapter"].items() if key in read}
    tree["train"]["method"], tree["adapter"]["name"], tree["evaluate"]["baselines"] = method, adapter, []
    return tree


def _recompute_activations(tree: dict[str, Any], job: Job) -> None:
    """Sets activation checkpointing for back-propagation, where it is left open and can be had."""
    train = tree["train"]
    if train["method"] != "backprop" or train["activation_checkpointing"] != "auto":
        return
    with suppress(UnsupportedError):
        check_support(job.facts, tree["adapter"]["name"], job.task.form, "backprop", activation_checkpointing=True)
        train["activation_checkpointing"] = True


def _cell(folder: Path, name: str, tree: Mapping[str, Any], baseline: str | None, limit: int | None) -> Cell:
    """Runs one cell in a fresh process and reads what it left behind."""
    at = _folder_of(folder, name)
    at.parent.mkdir(exist_ok=True)
    kind, method = ("trained", tree["train"]["method"]) if baseline is None else ("baseline", None)
    spec = {"recipe": {**tree, "out": str(at)}, "baseline": baseline, "memory_limit": limit}
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
        return Cell(name, kind, {}, 0.0, None, None, why, method)
    found = json.loads(done.stdout)
    recomputes = bool(tree["train"]["activation_checkpointing"] is True) and method == "backprop"
    return Cell(
        name, kind, found["metrics"], found["seconds"], found["peak_memory_bytes"], None, None, method, recomputes
    )


def _folder_of(folder: Path, name: str) -> Path:
    return folder / "cells" / name.replace("/", "-")


def _predictions(folder: Path, name: str) -> list[Prediction]:
    return read_predictions(_folder_of(folder, name) / "predictions" / "test.jsonl")


def _against_best_baseline(job: Job, cells: Sequence[Cell], folder: Path, recipe: Recipe) -> list[Cell]:
    """Adds to every trained cell the paired difference to the baseline with the best choosing metric."""
    metric = job.task.metric
    baselines = [c for c in cells if c.kind == "baseline" and metric in c.metrics]
    if not baselines:
        return list(cells)
    sign = -1.0 if metric == "loss" else 1.0
    best = max(baselines, key=lambda c: sign * c.metrics[metric]["value"])
    theirs = _predictions(folder, best.name)
    section, compared = job.recipe.evaluate, []
    for cell in cells:
        if cell.kind == "trained" and cell.error is None and metric in cell.metrics:
            ours = _predictions(folder, cell.name)
            difference = compare_predictions(job.task, ours, theirs, section, recipe.seed)[metric]
            cell = replace(cell, against_best_baseline={"baseline": best.name, **asdict(difference)})
        compared.append(cell)
    return compared
