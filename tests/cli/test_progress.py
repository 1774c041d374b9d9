"""What a person sees while a run works."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cli.scenes import put, reviews
from tunefork import finetune
from tunefork.cli.progress import Watcher
from tunefork.train.loop import Event
from tunefork.train.memory import anonymous_bytes
from tunefork.workflows import Listener

STEP = {"loss": 0.75463, "peak_memory_bytes": 153 * 2**20}
LOOK = {"metric": "accuracy", "value": 0.5, "better": True, "peak_memory_bytes": 153 * 2**20}


def watched(terminal: bool, values: Mapping[str, Any] = STEP) -> str:
    """What 80 columns show of the last 2 of 1,200 steps."""
    said = io.StringIO()
    watcher = Watcher(Console(file=said, width=80, force_terminal=terminal, highlight=False))
    watcher.steps = 1200
    for event in (
        Event("step", 1198, {**values, "tokens": 4000}),
        Event("look", 1198, LOOK),
        Event("step", 1199, {**values, "tokens": 5228}),
        Event("step", 1200, {**values, "tokens": 6456}),
        Event("stop", 1200, {}),
    ):
        watcher.event(event)
    return said.getvalue()


def test_where_there_is_no_terminal_a_look_and_a_step_are_a_line_each() -> None:
    look, step = watched(False).splitlines()
    assert look == "step 1,198: dev accuracy 0.500 (best so far)"
    told = r"step 1,200/1,200 · loss 0\.7546 · dev accuracy 0\.500 · [\d,]+ tokens/s · peak 153 MiB · 0\.0 s left"
    assert re.fullmatch(told, step)


def test_a_narrow_terminal_leaves_out_the_end_of_the_line_and_no_count() -> None:
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", watched(True)).strip().rpartition("\r")[2].splitlines()[-1]
    assert re.search(r" 1200/1200 .*loss 0\.7546 · dev accuracy 0\.500 · ", last)
    assert len(last) <= 80


def test_zeroth_order_steps_tell_slope_and_queries() -> None:
    values = {"projected_gradient": 0.25, "queries": 8.0, "row_forwards": 512.0}
    assert "|g| 0.25 · 8 queries · " in watched(False, {**STEP, **values})
    assert "|g| 0.25 · 1 query · " in watched(False, {**STEP, **values, "queries": 1.0})


def test_memory_while_it_works_is_the_peak_that_the_result_keeps(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    class Memory(Listener):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def event(self, event: Event) -> None:
            self.seen.append(event.values["peak_memory_bytes"])

    if anonymous_bytes() is None:
        pytest.skip("the system does not tell")
    rows = put(tmp_path / "rows.csv", reviews())
    recipe = {"task": "classification", "data": {"train": str(rows)}, "out": str(tmp_path / "run")}
    heard = Memory()
    short = {"train": {"max_steps": 3}, "evaluate": {"baselines": [], "bootstrap": 100}}
    run = finetune({**recipe, **short, "model": str(tiny("llama"))}, listener=heard)
    peak = run.result["peak_memory_bytes"]["value"]
    assert heard.seen == sorted(heard.seen)
    assert 0 < heard.seen[-1] <= peak < 1.05 * heard.seen[-1]
    assert "peak_memory_bytes" not in run.path.joinpath("log.jsonl").read_text()
