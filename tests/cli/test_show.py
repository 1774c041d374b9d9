"""Tables as a terminal shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tunefork.cli.show import comparison_table, show_spread
from tunefork.workflows.advice import Cell
from tunefork.workflows.compare import Comparison
from tunefork.workflows.seeds import SeedsResult


@pytest.mark.parametrize("metric", ["accuracy", "adjacent_agreement"])
def test_a_comparison_is_readable_at_80_columns(metric: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure in one piece, whatever sign it has and however long it took."""
    figure = {metric: {"value": 0.861, "low": 0.838, "high": 0.883, "n": 872}}
    against = {"baseline": "zero_shot", "difference": -0.021, "low": -0.052, "high": 0.011, "clear": False}
    names = ("zo/prefix", "backprop/prefix", "backprop/qlora")
    cells = [Cell("zero_shot", "baseline", figure, 4.0, 812 * 2**20, None)]
    cells += [Cell(name, "trained", figure, 45_000.0, 1_010 * 2**20, against, None, "zo") for name in names]
    cells.append(Cell("dora", "trained", {}, 0.0, None, None, "It failed.", "backprop"))
    Console(width=80, highlight=False).print(comparison_table(Comparison(Path("out"), metric, cells)))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for whole, times in (("0.861", 4), ("(0.838–0.883)", 4), ("−0.021", 3), ("−0.052 to 0.011", 3), ("1010 MiB", 3)):
        assert said.count(whole) == times, said
    for name in (*names, "minus zero_shot", "12 h 30 min", "failed"):
        assert name in said, said


def test_seeds_stand_beside_the_best_baseline_of_each_metric(capsys: pytest.CaptureFixture[str]) -> None:
    spread = {"mean": 0.861, "sd": None, "min": 0.861, "max": 0.861, "n": 1}
    baselines = {
        "zero_shot": {"loss": {"value": 2.5}, "adjacent_agreement": {"value": 0.25}},
        "in_context": {"loss": {"value": 3.5}, "adjacent_agreement": {"value": 0.75}},
        "lead3": {},
    }
    metrics = {"loss": spread, "adjacent_agreement": spread, "stopped": spread}
    show_spread(Console(width=80, highlight=False), SeedsResult(Path("out"), [], metrics, baselines))
    lines = {line.split()[0]: line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["loss"].endswith("zero_shot 2.500")
    assert lines["adjacent_agreement"].endswith("in_context 0.750")
    assert lines["stopped"].endswith("0.861")
