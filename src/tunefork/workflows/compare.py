"""Methods and baselines on one task in one table, each in a process of its own, so that its memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunefork import words
from tunefork.errors import (
    Interrupted,
    MissingExtraError,
    RecipeError,
    RunError,
    TuneforkError,
    UnsupportedError,
    did_you_mean,
)
from tunefork.evaluate.objective import check_objective
from tunefork.evaluate.stored import read_predictions
from tunefork.evaluate.summary import compare_predictions
from tunefork.files import make_folder, write_json
from tunefork.methods import check_settings, list_methods, method_info
from tunefork.metrics import Paired
from tunefork.models import check_support
from tunefork.recipe import Recipe, make_recipe
from tunefork.recipe.schema import AdapterSection, TrainSection, ZoSection
from tunefork.train.interrupt import Interrupt
from tunefork.train.loop import fingerprint_rows
from tunefork.train.prepare import Job, check_together, prepare, refuse_errors
from tunefork.workflows.advice import Advice, Cell, advise
from tunefork.workflows.finetune import as_recipe, free_folder
from tunefork.workflows.tuned import require_local

COMPARISON_SCHEMA = 1
KEPT = "comparison.json"
_OF_BACKPROP = ("betas", "adam_epsilon", "max_grad_norm", "activation_checkpointing")
_ASK_SECONDS = 0.2  # how often a signal is looked for while a cell runs


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
    on_cell: Callable[[str, Cell | None], None] = lambda name, cell: None,
) -> Comparison:
    """Runs every baseline that fits the task, and every method in `methods`, on the same rows.

    A method is `adapter` or `method/adapter`: `lora`, `backprop/none`. By default: every adapter this model and
    task support with the recipe's method, and beside zo `backprop/lora`. A cell that fails keeps its place, with the
    sentence that says why. A setting that one method alone reads goes to its cells, the learning rate to those of the
    recipe's own method, and what no cell reads is refused. So with `zo.objective` back-propagation still lowers the
    loss, and beside zo it recomputes activations, which is the least memory that it takes; all are measured alike.

    comparison.json is written after each cell. The same call with the same `out` keeps what is measured, goes on with
    a cell that was interrupted, and tries again what failed.

    Args:
        memory_limit: bytes. Micro-batches are made smaller until the forecast keeps to it, and what was measured above
            it is not advised.
        on_cell: hears of each cell as it begins (None) and once it is measured.

    Raises:
        RunError: `out` holds other things, or a comparison that was begun otherwise.
        Interrupted: Ctrl-C or SIGTERM; everything up to there is kept.
    """
    recipe = as_recipe(recipe)
    require_local(recipe, "`tunefork train --method hosted`, which sets baselines beside it, or `tunefork evaluate`")
    if methods is not None and not methods:
        raise RecipeError("`methods` must name at least one. Received none. Try --methods lora,none.")
    own = recipe.train.method
    among = {own, *(["backprop"] if own == "zo" else [])} if methods is None else {_method(recipe, n) for n in methods}
    trained = {n: _changes(recipe, n, among) for n in methods or ()}  # wrong names are refused before anything runs
    if own not in among and recipe.train.learning_rate != "auto":
        raise RecipeError(
            f"`train.learning_rate` is that of the recipe's method, which must then be compared. Received {own}, and "
            f"methods {', '.join(methods or ())}. Try --method {min(among)}."
        )
    folder = Path(recipe.out) if recipe.out is not None else free_folder(recipe)
    kept = _read(folder)
    bare = _read_by(recipe, own, among)
    bare = bare.model_copy(update={"adapter": AdapterSection(name=recipe.adapter.name)})  # a cell reads the rest
    job = prepare(bare)
    refuse_errors(job.findings)
    if methods is None:
        trained = _supported(recipe, job, among)
    if any(tree["train"]["method"] == "zo" for tree in trained.values()):
        for tree in trained.values():
            _recompute_activations(tree, job)
    for tree in trained.values():
        _check(tree, job)
    baselines = {name: bare.model_dump(mode="json") for name in job.recipe.evaluate.baselines}
    asked = _asked(job, baselines, trained, memory_limit)
    if kept is not None and kept.get("asked") != asked:
        raise RunError(
            f"A comparison must go on as it was begun, on the same rows. {folder} was begun with other methods, "
            "settings or rows. Try the command that began it, or another --out."
        )
    measured = {cell["name"]: Cell(**cell) for cell in kept["cells"] if cell["error"] is None} if kept else {}
    make_folder(folder)
    cells: list[Cell] = []

    def keep(advice: Advice | None = None) -> Comparison:
        comparison = Comparison(folder, job.task.metric, cells, advice)
        write_json(folder / KEPT, {**comparison.as_dict(), "asked": asked})
        return comparison

    with Interrupt() as interrupt:
        for name, tree in {**baselines, **trained}.items():
            cell = measured.get(name)
            if cell is None:
                on_cell(name, None)
                try:
                    cell = _cell(folder, name, tree, name not in trained, memory_limit, interrupt)
                except Interrupted as stop:
                    raise Interrupted(
                        f"{stop} {len(cells)} of {len(baselines) + len(trained)} cells are measured and kept in "
                        f"{folder}; the same command with --out {folder} goes on."
                    ) from None
            cells = _against_best_baseline(job, folder, [*cells, cell])
            keep()
            on_cell(name, cells[-1])

    def paired(a: Cell, b: Cell) -> Paired:
        return _difference(job, folder, a.name, b.name)

    return keep(advise(job.task.metric, cells, memory_limit, paired))


def _read(folder: Path) -> dict[str, Any] | None:
    """What an earlier call kept in `folder`; None where it is free. Raises RunError where other things are there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        return json.loads((folder / KEPT).read_bytes())
    except (OSError, ValueError):
        raise RunError(
            f"A comparison needs an empty folder, or its own. Received {folder}, which is neither. Try another --out."
        ) from None


def _asked(
    job: Job, baselines: Mapping[str, Any], trained: Mapping[str, Any], memory_limit: int | None
) -> dict[str, Any]:
    """What decides every cell, as JSON gives it back. Where the comparison lies is no part of it."""
    cells = {name: {**tree, "out": None} for name, tree in {**baselines, **trained}.items()}
    rows = {name: fingerprint_rows(rows) for name, rows in job.rendered.items()}
    asked = {"cells": cells, "rows": rows, "model": job.facts.fingerprint, "memory_limit_bytes": memory_limit}
    return json.loads(json.dumps(asked))


def _supported(recipe: Recipe, job: Job, among: Collection[str]) -> dict[str, dict[str, Any]]:
    """Every adapter that the recipe's method, model and task allow, by name, and beside zo back-propagation."""
    names = list(method_info(recipe.train.method).adapters)
    if recipe.train.method == "zo":
        names.append("backprop/qlora" if job.facts.quantized else "backprop/lora")
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        tree = _changes(recipe, name, among)
        with suppress(RecipeError, UnsupportedError, MissingExtraError):
            _check(tree, job)
            found[name] = tree
    return found


def _check(tree: Mapping[str, Any], job: Job) -> None:
    """Refuses a cell whose method, adapter, model and task do not go together."""
    recipe = make_recipe(tree)
    check_settings(recipe)
    check_together(recipe, job.facts, job.task)
    check_objective(recipe.zo.objective, job.renderer, job.examples["train"])


def _method(recipe: Recipe, name: str) -> str:
    return name.rpartition("/")[0] or recipe.train.method


def _read_by(recipe: Recipe, method: str, among: Collection[str]) -> Recipe:
    """The recipe without what other methods `among` the cells read. What none of them reads stays, to be refused."""
    zo, train, usual = recipe.zo, recipe.train, TrainSection()
    if method != "zo" and "zo" in among:
        zo = ZoSection()
    if method != "backprop" and "backprop" in among:
        train = train.model_copy(update={name: getattr(usual, name) for name in _OF_BACKPROP})
    if method != recipe.train.method:
        train = train.model_copy(update={"learning_rate": usual.learning_rate})
    return recipe.model_copy(update={"zo": zo, "train": train})


def _changes(recipe: Recipe, name: str, among: Collection[str]) -> dict[str, Any]:
    """The recipe with the method and adapter that `name` stands for, and no baselines of its own."""
    method, adapter = _method(recipe, name), name.rpartition("/")[2]
    allowed = method_info(method).adapters
    if adapter not in allowed:
        whole = {info.name: f"{info.name}/{info.adapters[0]}" for info in list_methods() if info.adapters}
        instead = did_you_mean(adapter, allowed) or f" Try {whole.get(adapter, 'lora')}."
        adapters = f"with an adapter of {', '.join(allowed)}" if allowed else "of a method that trains here"
        raise RecipeError(f"A method must be an adapter, or METHOD/ADAPTER, {adapters}. Received {name!r}.{instead}")
    tree = _read_by(recipe, method, among).model_dump(mode="json")
    read = {"prefix_tokens"} if adapter == "prefix" else set[str]()
    if adapter in ("lora", "dora", "qlora"):
        read = {"rank", "alpha", "dropout", "targets"}
    tree["adapter"] = {key: value for key, value in tree["adapter"].items() if key in read}
    tree["train"]["method"], tree["adapter"]["name"], tree["evaluate"]["baselines"] = method, adapter, []
    del tree["evaluate"]["demonstrations"]
    return tree


def _recompute_activations(tree: dict[str, Any], job: Job) -> None:
    """Sets activation checkpointing for back-propagation, where it is left open and can be had."""
    train = tree["train"]
    if train["method"] != "backprop" or train["activation_checkpointing"] != "auto":
        return
    with suppress(UnsupportedError):
        check_support(job.facts, tree["adapter"]["name"], job.task.form, "backprop", activation_checkpointing=True)
        train["activation_checkpointing"] = True


def _cell(
    folder: Path, name: str, tree: Mapping[str, Any], baseline: bool, limit: int | None, interrupt: Interrupt
) -> Cell:
    """Runs one cell in a fresh process and reads what it left behind."""
    at = _folder_of(folder, name)
    at.parent.mkdir(exist_ok=True)
    kind, method = ("baseline", None) if baseline else ("trained", tree["train"]["method"])
    spec = {"recipe": {**tree, "out": str(at)}, "baseline": name if baseline else None, "memory_limit": limit}
    code, said, problem = _run_cell(spec, interrupt)
    if code != 0:
        why = problem.strip().splitlines()[-1] if problem.strip() else f"exit code {code}"
        if code not in (TuneforkError.exit_code, 2):
            (folder / f"{at.name}.error.log").write_text(problem)
            why += f" (see {at.name}.error.log)"
        return Cell(name, kind, {}, 0.0, None, None, why, method)
    found = json.loads(said)
    recomputes = tree["train"]["activation_checkpointing"] is True and method == "backprop"
    return Cell(
        name, kind, found["metrics"], found["seconds"], found["peak_memory_bytes"], None, None, method, recomputes
    )


def _run_cell(spec: Mapping[str, Any], interrupt: Interrupt) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a cell's process, which is asked to stop when this one is."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tunefork.workflows.cell"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    given: str | None = json.dumps(spec)
    asked_to_stop = False
    try:
        while True:
            try:
                said, problem = process.communicate(given, timeout=_ASK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                given = None  # what was not yet written is remembered
            if interrupt.received is not None and not asked_to_stop:
                process.terminate()  # not SIGINT: from a terminal it has had one, and a second would not let it save
                asked_to_stop = True
    except BaseException:
        process.kill()
        process.wait()
        raise
    interrupt.check()
    return process.returncode, said, problem


def _folder_of(folder: Path, name: str) -> Path:
    return folder / "cells" / name.replace("/", "-")


def _difference(job: Job, folder: Path, ours: str, theirs: str) -> Paired:
    """The paired difference of two cells in the choosing metric."""
    a, b = (read_predictions(_folder_of(folder, name) / "predictions" / "test.jsonl") for name in (ours, theirs))
    return compare_predictions(job.task, a, b, job.recipe.evaluate, job.recipe.seed)[job.task.metric]


def _against_best_baseline(job: Job, folder: Path, cells: Sequence[Cell]) -> list[Cell]:
    """The cells, every trained one with the paired difference to the baseline with the best choosing metric."""
    metric = job.task.metric
    baselines = [c for c in cells if c.kind == "baseline" and metric in c.metrics]
    if not baselines:
        return list(cells)
    best = (max if words.higher_is_better(metric) else min)(baselines, key=lambda c: c.metrics[metric]["value"]).name
    compared: list[Cell] = []
    for cell in cells:
        known = cell.against_best_baseline is not None and cell.against_best_baseline["baseline"] == best
        if cell.kind == "trained" and metric in cell.metrics and not known:
            against = {"baseline": best, **asdict(_difference(job, folder, cell.name, best))}
            cell = replace(cell, against_best_baseline=against)
        compared.append(cell)
    return compared
