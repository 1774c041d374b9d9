"""How weights change: one file a method, behind one Protocol, in one registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunefork.errors import RecipeError, did_you_mean
from tunefork.methods import backprop, zo
from tunefork.methods.base import Method, MethodInfo, Objective, RowLosses, StepResult, UsualBatch
from tunefork.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class _Entry:
    info: MethodInfo
    make: Callable[[torch.nn.Module, Recipe, Path | None, Mapping[str, Any] | None, Objective | None], Method]
    check: Callable[[Recipe], None]
    batch: Callable[[Recipe, bool], UsualBatch]
    beside: Callable[[Recipe], tuple[str, ...]]


_REGISTRY = {
    m.INFO.name: _Entry(m.INFO, m.make, m.check_settings, m.usual_batch, m.learns_beside) for m in (backprop, zo)
}
_HOSTED = MethodInfo(
    name="hosted",
    summary="A service fine-tunes a model that it keeps; its answers are measured here.",
    paper="the service's own way",
    adapters=(),
    memory="none here",
    needs_backward=False,
)
_INFOS = {info.name: info for info in (*(entry.info for entry in _REGISTRY.values()), _HOSTED)}


def list_methods() -> list[MethodInfo]:
    """Every method, by name. `hosted` trains no adapter here: a room above hands the whole run to a service."""
    return [_INFOS[name] for name in sorted(_INFOS)]


def method_info(name: str) -> MethodInfo:
    """Raises RecipeError with a did-you-mean for an unknown name."""
    if name not in _INFOS:
        raise RecipeError(
            f"`train.method` must be one of {', '.join(sorted(_INFOS))}. Received {name!r}."
            + did_you_mean(name, _INFOS)
        )
    return _INFOS[name]


def _local(recipe: Recipe) -> _Entry:
    """Raises RecipeError for a method that does not train here."""
    name = method_info(recipe.train.method).name
    if name not in _REGISTRY:
        raise RecipeError(
            f"`train.method` must be one that trains here for this. Received {name!r}. Try one of "
            f"{', '.join(sorted(_REGISTRY))}."
        )
    return _REGISTRY[name]


def check_settings(recipe: Recipe) -> None:
    """Raises RecipeError for a setting that the recipe's method does not read, or cannot."""
    _local(recipe).check(recipe)


def usual_batch(recipe: Recipe, mean: bool) -> UsualBatch:
    """What a step sees where the recipe does not say. `mean`: what is trained for is a mean over rows."""
    return _local(recipe).batch(recipe, mean)


def learns_beside(recipe: Recipe) -> tuple[str, ...]:
    """Adapters with which the method is given the base as stored, frozen: what it learns lies beside the model."""
    return _local(recipe).beside(recipe)


def steps_only(recipe: Recipe) -> Recipe:
    """The recipe without what a method does once before its first step: for a forecast, which looks at steps."""
    return recipe.model_copy(update={"zo": recipe.zo.model_copy(update={"calibrate": False})})


def make_method(
    model: torch.nn.Module,
    recipe: Recipe,
    trajectory: Path | None = None,
    about: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
) -> Method:
    """The recipe's method, bound to a model that is ready to train.

    `trajectory` is where it may log its steps, with what `about` tells whoever rebuilds the model from them.
    `objective` is what it raises, in place of lowering the loss.
    """
    return _local(recipe).make(model, recipe, trajectory, about, objective)


__all__ = [
    "Method",
    "MethodInfo",
    "Objective",
    "RowLosses",
    "StepResult",
    "UsualBatch",
    "check_settings",
    "learns_beside",
    "list_methods",
    "make_method",
    "method_info",
    "steps_only",
    "usual_batch",
]
