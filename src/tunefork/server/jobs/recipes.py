"""From a job to the recipe of a run: what each hyper-parameter means here, and what `auto` is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunefork.methods import method_info
from tunefork.recipe import Recipe, make_recipe
from tunefork.recipe.resolve import _learning_rate as automatic_learning_rate
from tunefork.server.jobs.keep import TRAIN, VALID
from tunefork.server.settings import Settings
from tunefork.server.store import Job

METHODS = ("supervised", "dpo")
ADAPTERS = ("lora", "dora", "qlora", "none")  # those whose result can be served

_EPOCHS, _LEAST, _MOST = 3, 100, 25_000
_TASKS = {
    "chat": ("chat", "openai"),
    "completion": ("generation", "prompt_completion"),
    "preference": ("preference", "preference"),
}
_MANAGED = {
    "learning_rate",
    "batch_size",
    "epochs",
    "evaluate_every",
    "save_every",
    "keep_checkpoints",
    "keep_best",
    "patience",
    "tensorboard",
}


def resolve_hyperparameters(given: Mapping[str, Any], examples: int) -> dict[str, Any]:
    """Every `auto` of a job as a number.

    `n_epochs`: 3, more for few examples (at least 100 are seen, in at most 25 epochs), fewer for many (at most 25,000),
    as OpenAI's cookbook tells. `batch_size`: 0.2 % of the examples, 1 to 256. `learning_rate_multiplier`: 1, and 1 is
    the rate the recipe takes for this adapter and size of model, a tenth of it for preferences. `beta`: 0.1.
    """
    epochs = _EPOCHS
    if examples * _EPOCHS < _LEAST:
        epochs = min(25, _LEAST // max(1, examples))
    elif examples * _EPOCHS > _MOST:
        epochs = max(1, _MOST // examples)
    auto = {
        "n_epochs": epochs,
        "batch_size": min(256, max(1, round(examples * 0.002))),
        "learning_rate_multiplier": 1.0,
        "beta": 0.1,
    }
    return {name: auto.get(name, value) if value == "auto" else value for name, value in given.items()}


def check_extension(given: Mapping[str, Any] | None, method: str) -> str | None:
    """What is wrong with a job's `tunefork` section, in words; None where nothing is. Raises RecipeError."""
    adapter, train = _extension(given)
    if managed := sorted(_MANAGED & train.keys()):
        return f"`tunefork.train.{managed[0]}` follows from the job's own hyperparameters. Leave it out."
    recipe = make_recipe({"task": "chat", "adapter": adapter, "train": train})
    if not method_info(recipe.train.method).needs_backward:  # its checkpoints cannot be made into models yet
        return f"`tunefork.train.method` must be backprop. Received {recipe.train.method!r}."
    if method == "dpo" and recipe.adapter.name == "none":
        return "`tunefork.adapter.name` must be an adapter for dpo, which holds it to the model below. Received 'none'."
    if recipe.adapter.name not in ADAPTERS:
        return f"`tunefork.adapter.name` must be one of {', '.join(ADAPTERS)}. Received {recipe.adapter.name!r}."
    return None


def recipe_of(job: Job, settings: Settings, folder: Path, parameters: int) -> Recipe:
    """The recipe of a job whose files are validated and linked in `folder`.

    All rows are trained on, the last weights are kept (checkpoints let the client choose others), findings of the data
    are told rather than refused. A checkpoint is made at the end of an epoch, or of equal parts of one that is longer
    than a tenth of the run. Raises RecipeError.
    """
    chosen = job.method["hyperparameters"]
    adapter, train = _extension(job.extension)
    task, layout = _TASKS[job.layout or "chat"]
    section = settings.catalogue.models[job.base].model_dump(exclude_unset=True)
    kind = adapter["name"] if isinstance(adapter, dict) else adapter
    rate, _ = automatic_learning_rate(kind, parameters)
    rate *= 0.1 if task == "preference" else 1.0
    every = _every(job.method["examples"], chosen["batch_size"], chosen["n_epochs"], train.get("max_steps"))
    valid = folder / VALID
    return make_recipe(
        {
            "model": {**section, "kind": "causal"},
            "task": {"name": task, "beta": chosen["beta"]} if task == "preference" else task,
            "data": {
                "train": str(folder / TRAIN),
                **({"dev": str(valid)} if job.validation_file else {"dev_fraction": 0.0}),
                "layout": layout,
                "test_fraction": 0.0,
                **dict.fromkeys(("max_unusable", "max_conflicts", "max_leaked", "max_cut"), 1.0),
            },
            "adapter": adapter,
            "train": {
                **train,
                "learning_rate": rate * chosen["learning_rate_multiplier"],
                "batch_size": chosen["batch_size"],
                "epochs": float(chosen["n_epochs"]),
                "evaluate_every": every,
                "save_every": every,
                "keep_best": False,
            },
            "evaluate": {"baselines": ()},
            "out": str(folder / "run"),
            "seed": job.seed,
        }
    )


def _every(examples: int, batch: int, epochs: int, max_steps: int | None) -> int:
    """Steps between checkpoints: whole epochs, of which there are at most 20, or equal parts of a long one."""
    per_epoch = math.ceil(examples / batch)
    steps = min(per_epoch * epochs, max_steps or per_epoch * epochs)
    parts = math.ceil(per_epoch / max(10, steps // 10))
    return min(steps, math.ceil(per_epoch / parts) if parts > 1 else per_epoch * math.ceil(epochs / 20))


def _extension(given: Mapping[str, Any] | None) -> tuple[str | dict[str, Any], dict[str, Any]]:
    given = given or {}
    adapter = given.get("adapter", "lora")
    return ({"name": "lora", **adapter} if isinstance(adapter, dict) else adapter), dict(given.get("train", {}))
