"""The same recipe with several seeds: mean and spread, because one run is one draw."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.files import write_json
from tunefork.recipe import Recipe
from tunefork.run import RESULT_SCHEMA
from tunefork.workflows.finetune import Listener, RunResult, as_recipe, finetune, free_folder


@dataclass(frozen=True, slots=True)
class SeedsResult:
    """One run a seed in `path`/seed-N, and the spread of each metric over them."""

    path: Path
    runs: Sequence[RunResult]
    spread: Mapping[str, Mapping[str, Any]]  # metric -> mean, sd, min, max, n


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
    folder = Path(recipe.out) if recipe.out is not None else free_folder(recipe)
    runs: list[RunResult] = []
    for k in range(seeds):
        out = folder / f"seed-{recipe.seed + k}"
        change: dict[str, Any] = {"seed": recipe.seed + k, "out": str(out)}
        if k > 0:
            change["evaluate"] = recipe.evaluate.model_copy(update={"baselines": ()})
        runs.append(finetune(recipe.model_copy(update=change), resume=resume and out.exists(), listener=listener))
    spread = {
        metric: _spread([run.result["test"][metric]["value"] for run in runs]) for metric in runs[0].result["test"]
    }
    write_json(
        folder / "seeds.json",
        {"schema": RESULT_SCHEMA, "seeds": [recipe.seed + k for k in range(seeds)], "spread": spread},
    )
    return SeedsResult(folder, runs, spread)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "min": min(values), "max": max(values), "n": len(values)}
