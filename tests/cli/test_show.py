"""Tables as a terminal shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tunefork.cli.show import comparison_table
from tunefork.workflows.advice import Cell
from tunefork.workflows.compare import Comparison


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
