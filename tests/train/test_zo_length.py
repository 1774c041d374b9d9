"""How long a run without gradients is: a budget of row-forwards, whatever a step takes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunefork.recipe import make_recipe
from tunefork.run import RunFolder
from tunefork.train.prepare import prepare
from tunefork.workflows import finetune
from tunefork.zo.options import presets

ROWS = 80


@pytest.mark.parametrize("objective", ["loss", "accuracy", "macro_f1"])
@pytest.mark.parametrize("preset", sorted(presets()))
def test_epochs_times_what_one_takes_are_the_budget(
    preset: str, objective: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"film {i},{'yes' if i % 2 else 'no'}\n" for i in range(ROWS)))
    recipe: dict[str, Any] = {
        "model": {"name": str(tiny("gpt2")), "device": "cpu"},
        "task": "classification",
        "adapter": "none",
        "data": {"train": str(file), "test_fraction": 0, "dev_fraction": 0.1, "max_leaked": 1},
        "train": {"method": "zo"},
        "zo": {"preset": preset, "objective": objective, "calibrate": False},
        "evaluate": {"baselines": []},
        "out": str(tmp_path / "run"),
    }
    resolved = prepare(make_recipe(recipe)).resolved
    epoch = resolved.steps_per_epoch
    done = finetune({**recipe, "train": {"method": "zo", "max_steps": 2 * epoch}})
    log = RunFolder.open(done.path, write=False).read_log()
    taken = [e["row_forwards"] for e in log if e["kind"] == "step"][epoch:]  # what is tried once is then over
    assert resolved.steps / epoch * sum(taken) == pytest.approx(160_000, rel=0.01)
