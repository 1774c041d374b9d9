"""A run that is stopped before or after its training says how to go on, and goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.scenes import put, reviews
from tunefork import finetune
from tunefork.errors import Interrupted
from tunefork.workflows import Listener


class Stop(Listener):
    """Presses Ctrl-C when a stage begins."""

    def __init__(self, at: str, presses: int) -> None:
        self.at, self.presses = at, presses

    def stage(self, text: str) -> None:
        if text == self.at:
            for _ in range(self.presses):
                signal.raise_signal(signal.SIGINT)


STAGES = {
    "loading the model": r"stopped has taken no step yet; --resume goes on\.$",
    "measuring on the test rows": r"stopped is trained and not yet measured; --resume goes on\.$",
}


@pytest.mark.parametrize(
    ("at", "presses"), [("loading the model", 2), *(("measuring on the test rows", n) for n in (1, 2))]
)
def test_ctrl_c_outside_training_says_how_to_go_on(
    at: str, presses: int, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = {
        "model": str(tiny("llama")),
        "task": "classification",
        "data": {"train": str(put(tmp_path / "rows.csv", reviews()))},
        "train": {"max_steps": 2},
        "evaluate": {"baselines": ["majority"], "bootstrap": 100},
    }
    whole = finetune({**recipe, "out": str(tmp_path / "whole")})
    out = str(tmp_path / "stopped")
    with pytest.raises(Interrupted, match=STAGES[at]):
        finetune({**recipe, "out": out}, listener=Stop(at, presses))
    assert finetune({**recipe, "out": out}, resume=True).result["test"] == whole.result["test"]
