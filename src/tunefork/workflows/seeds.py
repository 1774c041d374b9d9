"""The same recipe with several seeds: mean and spread, because one run is one draw."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.errors import RunError
from tunefork.files import write_json
from tunefork.recipe import Recipe
from tunefork.run import RESULT_SCHEMA, RunFolder
from tunefork.workflows.finetune import Listener, RunResult, as_recipe, finetune, free_folder


@dataclass(frozen=True, slots=True)
class SeedsResult:
    """One run a seed in `path`/seed-N, the spread of each metric over them, and the first one's baselines."""

    path: Path
    runs: Sequence[RunResult]
    spread: Mapping[str, Mapping[str, Any]]  # metric -> mean, sd, min, max, n
    baselines: Mapping[str, Mapping[str, Any]]  # name -> metric -> value, low, high, n: on the first seed's test rows


def seed_recipes(recipe: Recipe, seeds: int) -> list[Recipe]:
    """The recipe of each seed, in `out`/seed-N where `out` is given; only the first measures baselines."""
    found: list[Recipe] = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        change: dict[str, Any] = {"seed": seed}
        if recipe.out is not None:
            change["out"] = str(Path(recipe.out) / f"seed-{seed}")
        if found:
            change["evaluate"] = recipe.evaluate.model_copy(update={"baselines": ()})
        found.append(recipe.model_copy(update=change))
    return found


def finetune_seeds(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    seeds: int,
    *,
    resume: bool = False,
    listener: Listener | None = None,
) -> SeedsResult:
    """Runs seeds `seed`, `seed` + 1, … one after the other; baselines are measured with the first only.

    With `resume`, finished seeds are read back and the interrupted one goes on. Writes `seeds.json`.
    """
    recipe = as_recipe(recipe)
    if recipe.out is None:
        if resume:
            raise RunError("`resume` needs the folder of the seeds. Received no `out`. Try --out runs/NAME.")
        recipe = recipe.model_copy(update={"out": str(free_folder(recipe))})
    folder, each = Path(str(recipe.out)), seed_recipes(recipe, seeds)
    if not resume:
        for one in each:
            RunFolder.refuse_taken(str(one.out))
    runs = [finetune(one, resume=resume and Path(str(one.out)).exists(), listener=listener) for one in each]
    spread = {
        metric: _spread([run.result["test"][metric]["value"] for run in runs]) for metric in runs[0].result["test"]
    }
    baselines, numbers = runs[0].result["baselines"], [recipe.seed + k for k in range(seeds)]
    write_json(
        folder / "seeds.json",
        {"schema": RESULT_SCHEMA, "seeds": numbers, "spread": spread, "baselines": baselines},
    )
    return SeedsResult(folder, runs, spread, baselines)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "min": min(values), "max": max(values), "n": len(values)}
