"""Looks at data without training: the check alone, and a row as the model sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.data import Finding
from tunefork.errors import DataError, RecipeError, did_you_mean
from tunefork.hosted import is_hosted
from tunefork.recipe import Recipe
from tunefork.train.prepare import SPLITS, prepare, refuse_errors
from tunefork.workflows.finetune import as_recipe
from tunefork.workflows.hosted_plan import plan_hosted
from tunefork.workflows.tuned import require_local


@dataclass(frozen=True, slots=True)
class DataCheck:
    """Rows and tokens by split, and every finding."""

    counts: Mapping[str, Mapping[str, int]]
    findings: Sequence[Finding]

    @property
    def refused(self) -> bool:
        return any(f.level == "error" for f in self.findings)


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as token texts, ids and roles: prompt, trained, candidate, cut."""

    source: str
    tokens: Sequence[tuple[str, int, str]]


def check_data(recipe: Recipe | Mapping[str, Any] | str | Path) -> DataCheck:
    """The check that runs before every training, alone. Trains and writes nothing."""
    recipe = as_recipe(recipe)
    job = plan_hosted(recipe) if is_hosted(recipe.model.name) else prepare(recipe)
    return DataCheck(job.counts(), job.findings)


def show_data(recipe: Recipe | Mapping[str, Any] | str | Path, *, row: int = 0, split: str = "train") -> list[ShownRow]:
    """Row `row` (from 0) of a split, token by token. Several when one row becomes several sequences."""
    if split not in SPLITS:
        raise RecipeError(
            f"`split` must be one of {', '.join(SPLITS)}. Received {split!r}.{did_you_mean(split, SPLITS)}"
        )
    recipe = as_recipe(recipe)
    require_local(recipe, "`tunefork data export`, which writes the rows as a service gets them")
    job = prepare(recipe)
    examples = job.examples[split]
    if not examples:
        refuse_errors(job.findings)
        raise DataError(f"`split` must have rows to show. Received {split}, which has none. Try --split train.")
    if not 0 <= row < len(examples):
        raise DataError(
            f"`row` must be from 0 to {len(examples) - 1} in {split}. Received {row}. Rows are counted from 0."
        )
    return [ShownRow(r.example.source, job.renderer.explain(r)) for r in job.renderer.render(examples[row])]
