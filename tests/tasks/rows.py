"""Rows and tasks for the tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunefork.data.rows import Row
from tunefork.recipe.schema import DataSection, ModelKind, TaskSection
from tunefork.tasks import Example, Task, make_task


def rows(*values: Mapping[str, Any], file: str = "a.csv") -> list[Row]:
    return [Row(dict(v), file, i + 2) for i, v in enumerate(values)]


def made(
    name: str,
    train: Sequence[Row] = (),
    *,
    kind: ModelKind = "causal",
    labels: Mapping[str, str] | None = None,
    names: Sequence[str] | None = None,
    data: Mapping[str, Any] | None = None,
    **section: Any,
) -> Task:
    """`labels` as the recipe's `data.labels`, `names` as those of a trained model; `data`: the rest of that section."""
    found = DataSection.model_validate({"labels": labels, **(data or {})})
    return make_task(TaskSection.model_validate({"name": name, **section}), found, kind, train, names)


def only(task: Task, values: Mapping[str, Any]) -> Example:
    (part,) = task.rows(rows(values))
    return task.example(part)


def read(path: Path, limit: int) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [Row(json.loads(line), path.name, i) for i, line in zip(range(1, limit + 1), file, strict=False)]
