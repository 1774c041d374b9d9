"""The main job on what is shipped: the embedded model learns to sort the embedded customer feedback."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tunefork.data import read_rows, write_rows
from tunefork.recipe import Recipe, make_recipe
from tunefork.workflows.finetune import Listener, RunResult, finetune


def demo_recipe(out: str | Path) -> Recipe:
    """The embedded model with a head, feedback in three classes, full fine-tuning."""
    feedback = files("tunefork") / "assets" / "feedback"
    data = {split: str(feedback / f"{split}.csv") for split in ("train", "dev", "test")}
    task = {"name": "classification", "form": "head"}  # a sequence a row; asked in words there are three, and no gain
    return make_recipe({"model": "embedded", "task": task, "data": data, "train": {"epochs": 3}, "out": str(out)})


def demo_rows(path: str | Path, *, overwrite: bool = False) -> int:
    """Writes the embedded feedback, all of it in one file of the format that the name asks for; returns the rows."""
    folder = files("tunefork") / "assets" / "feedback"
    rows = [row.values for split in ("train", "dev", "test") for row in read_rows(str(folder / f"{split}.csv"))[0]]
    write_rows(path, rows, overwrite=overwrite)
    return len(rows)


def demo(out: str | Path = "runs/demo", *, listener: Listener | None = None) -> RunResult:
    """Trains, measures and keeps a small model in a few minutes on two CPU cores, with no network."""
    return finetune(demo_recipe(out), listener=listener)
