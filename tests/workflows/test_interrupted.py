"""A run that is stopped after its training says how to go on, and goes on."""

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
    """Presses Ctrl-C when the measuring begins."""

    def __init__(self, presses: int) -> None:
        self.presses = presses

    def stage(self, text: str) -> None:
        if text == "measuring on the test rows":
            for _ in range(self.presses):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_while_measuring_says_how_to_go_on(presses: int, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = {
        "model": str(tiny("llama")),
        "task": "classification",
        "data": {"train": str(put(tmp_path / "rows.csv", reviews()))},
        "train": {"max_steps": 2},
        "evaluate": {"baselines": ["majority"], "bootstrap": 100},
    }
    whole = finetune({**recipe, "out": str(tmp_path / "whole")})
    out = str(tmp_path / "stopped")
    with pytest.raises(Interrupted, match=r"stopped is trained and not yet measured; --resume goes on\.$"):
        finetune({**recipe, "out": out}, listener=Stop(presses))
    assert finetune({**recipe, "out": out}, resume=True).result["test"] == whole.result["test"]
