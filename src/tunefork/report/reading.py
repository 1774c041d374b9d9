"""A finished run, read back from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.errors import RunError
from tunefork.evaluate.stored import read_predictions
from tunefork.recipe import Recipe
from tunefork.run import RunFolder
from tunefork.tasks import Prediction, Task, make_task


@dataclass(frozen=True)
class Record:
    """What a run left behind, as the report needs it. docs/result.md says what `result` holds."""

    path: Path
    result: Mapping[str, Any]
    recipe: Recipe
    recipe_text: str
    steps: Sequence[Mapping[str, Any]]  # events of kind "step", oldest first
    task: Task
    predictions: Sequence[Prediction]  # on the test rows
    texts: Sequence[str]  # what was asked, one a prediction; empty where it was not kept
    baselines: Mapping[str, Sequence[Prediction]]

    @property
    def metric(self) -> str:
        """The metric that chose the weights."""
        return str(self.result["metric"])


def read_record(run: RunFolder) -> Record:
    """Reads `run`. Raises RunError when it is not finished, or a file of it cannot be read."""
    result = run.read_result()
    recipe = Recipe.model_validate(result["recipe"])
    kind = recipe.model.kind
    if kind == "auto":
        raise RunError(f"{run.result_path} must hold a resolved recipe. Received model.kind `auto`.")
    rows = result["data"]["counts"]["test"]["rows"]
    return Record(
        path=run.path,
        result=result,
        recipe=recipe,
        recipe_text=run.recipe_path.read_text(encoding="utf-8"),
        steps=[entry for entry in run.read_log() if entry["kind"] == "step"],
        task=make_task(recipe.task, recipe.data, kind, (), labels=result["labels"] or None),
        predictions=_predictions(run, "test", rows),
        texts=_texts(run) if rows else [],
        baselines={name: _predictions(run, f"test-{name}", rows) for name in result["baselines"]},
    )


def _predictions(run: RunFolder, name: str, rows: int) -> list[Prediction]:
    if not rows:
        return []
    path = run.predictions_path / f"{name}.jsonl"
    found = read_predictions(path) if path.is_file() else []
    if len(found) != rows:
        raise RunError(
            f"A finished run must have a prediction for each of its {rows} test rows. {path} has {len(found)}. "
            "Try a copy of the folder from a backup, or a new run."
        )
    return found


def _texts(run: RunFolder) -> list[str]:
    """What was asked, as it stands beside each prediction."""
    lines = (run.predictions_path / "test.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [str(json.loads(line).get("text", "")) for line in lines]
