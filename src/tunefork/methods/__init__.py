"""How weights change: one file a method, behind one Protocol, in one registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tunefork.errors import RecipeError, did_you_mean
from tunefork.methods import backprop
from tunefork.methods.base import Method, MethodInfo, RowLosses, StepResult
from tunefork.recipe.schema import Recipe

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Entry:
    info: MethodInfo
    make: Callable[[torch.nn.Module, Recipe], Method]


def _backprop(model: torch.nn.Module, recipe: Recipe) -> Method:
    return backprop.Backprop(model, recipe.train, autocast=_DTYPES[recipe.model.dtype])


_REGISTRY: dict[str, _Entry] = {backprop.INFO.name: _Entry(backprop.INFO, _backprop)}


def list_methods() -> list[MethodInfo]:
    """Every method, by name."""
    return [entry.info for _, entry in sorted(_REGISTRY.items())]


def method_info(name: str) -> MethodInfo:
    """Raises RecipeError with a did-you-mean for an unknown name."""
    if name not in _REGISTRY:
        raise RecipeError(
            f"`train.method` must be one of {', '.join(sorted(_REGISTRY))}. Received {name!r}."
            + did_you_mean(name, _REGISTRY)
        )
    return _REGISTRY[name].info


def make_method(model: torch.nn.Module, recipe: Recipe) -> Method:
    """The recipe's method, bound to a model that is ready to train."""
    method_info(recipe.train.method)
    return _REGISTRY[recipe.train.method].make(model, recipe)


__all__ = ["Method", "MethodInfo", "RowLosses", "StepResult", "list_methods", "make_method", "method_info"]
