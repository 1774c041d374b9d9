"""A finished run, read back from its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.errors import RunError
from tunefork.recipe import Recipe
from tunefork.run import RunFolder
from tunefork.tasks import Prediction, Task, make_task

_FIELDS = {field.name for field in dataclasses.fields(Prediction)}


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
    test = _lines(run, "test") if result["test"] else []
    return Record(
        path=run.path,
        result=result,
        recipe=recipe,
        recipe_text=run.recipe_path.read_text(encoding="utf-8"),
        steps=[entry for entry in run.read_log() if entry["kind"] == "step"],
        task=make_task(recipe.task, recipe.data, kind, (), labels=result["labels"] or None),
        predictions=[_prediction(line) for line in test],
        texts=[str(line.get("text", "")) for line in test],
        baselines={name: [_prediction(line) for line in _lines(run, f"test-{name}")] for name in result["baselines"]},
    )


def _lines(run: RunFolder, name: str) -> list[dict[str, Any]]:
    path = run.predictions_path / f"{name}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise RunError(
            f"A finished run must have its predictions. {path} cannot be read: {error}. "
            "Try a copy of the folder from a backup, or a new run."
        ) from error


def _prediction(line: Mapping[str, Any]) -> Prediction:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in line.items() if key in _FIELDS}
    return Prediction(**values)
