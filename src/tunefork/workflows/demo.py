"""The main job on what is shipped: the embedded model learns to sort the embedded customer feedback."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tunefork.recipe import Recipe, make_recipe
from tunefork.workflows.finetune import Listener, RunResult, finetune


def demo_recipe(out: str | Path) -> Recipe:
    """The embedded model with a head, feedback in three classes, full fine-tuning."""
    feedback = files("tunefork") / "assets" / "feedback"
    data = {split: str(feedback / f"{split}.csv") for split in ("train", "dev", "test")}
    task = {"name": "classification", "form": "head"}  # a sequence a row; asked in words there are three, and no gain
    return make_recipe({"model": "embedded", "task": task, "data": data, "train": {"epochs": 6}, "out": str(out)})


def demo(out: str | Path = "runs/demo", *, listener: Listener | None = None) -> RunResult:
    """Trains, measures and keeps a small model in a few minutes on two CPU cores, with no network."""
    return finetune(demo_recipe(out), listener=listener)
