"""What `compare` advises: back-propagation where it fits, unless zo is measured to be better; the limit is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tunefork.metrics import Paired
from tunefork.workflows.advice import Cell, advise

MIB = 2**20
Difference = Callable[[Cell, Cell], Paired]


def cell(name: str, accuracy: float, mib: int = 300, seconds: float = 200.0, **more: Any) -> Cell:
    figure = {"value": accuracy, "low": accuracy - 0.03, "high": accuracy + 0.03, "n": 500}
    method = name.partition("/")[0] if "/" in name else None
    kind = "trained" if method else "baseline"
    fields: dict[str, Any] = {"against_best_baseline": None, "method": method, **more}
    return Cell(name, kind, {"accuracy": figure}, seconds, mib * MIB, **fields)


def differ(low: float, high: float) -> Difference:
    return lambda a, b: Paired((low + high) / 2, low, high, 0.01, 500, not low <= 0 <= high)


ZO = cell("zo/none", 0.87)
BACKPROP = cell("backprop/lora", 0.92, mib=800, seconds=31, activation_checkpointing=True)
BASELINE = cell("tfidf", 0.8)
MINUS = "\N{MINUS SIGN}"


def advice(*cells: Cell, limit: int | None = None, paired: Difference | None = None) -> tuple[str | None, str]:
    found = advise("accuracy", [BASELINE, *cells], limit, paired or differ(-0.08, -0.02))
    assert found is not None
    return found.use, found.sentence


def test_where_it_fits_and_is_better_back_propagation() -> None:
    for limit, fits in ((None, "fits,"), (1024 * MIB, "fits in 1.00 GiB,")):
        use, said = advice(ZO, BACKPROP, limit=limit)
        assert use == "backprop/lora"
        assert f"Use backprop/lora: back-propagation {fits} and is better on these rows." in said
        assert "with activation checkpointing reached accuracy 0.920 (0.890–0.950) with 800 MiB and 31 s" in said
        assert "zo/none reached accuracy 0.870 (0.840–0.900) with 300 MiB and 3 min 20 s" in said
        assert f"the difference is {MINUS}0.050 ({MINUS}0.080 to {MINUS}0.020) for zo/none" in said
        assert said.endswith("With less memory than 800 MiB use zo/none.")


def test_under_a_limit_that_it_breaks_zo() -> None:
    use, said = advice(ZO, BACKPROP, limit=512 * MIB)
    assert use == "zo/none"
    assert "backprop/lora with activation checkpointing took 800 MiB, more than 512 MiB" in said


def test_under_a_limit_that_both_break_neither() -> None:
    use, said = advice(ZO, BACKPROP, limit=256 * MIB)
    assert use is None
    assert said.startswith("Neither fits:")
    assert "took 800 MiB" in said and "took 300 MiB" in said


def test_what_failed_is_not_advised_and_named() -> None:
    failed = Cell("backprop/lora", "trained", {}, 0.0, None, None, "The memory must suffice.", "backprop")
    use, said = advice(ZO, failed)
    assert (use, "backprop/lora was not measured (The memory must suffice)" in said) == ("zo/none", True)


@pytest.mark.parametrize(
    ("paired", "zo_seconds", "expected", "words"),
    [
        (differ(0.01, 0.05), 200, "zo/none", "it is better on these rows"),
        (differ(-0.02, 0.03), 200, "backprop/lora", "fits, and these rows do not tell the two apart"),
        (differ(-0.02, 0.03), 5, "zo/none", "and it takes less time"),
    ],
)
def test_where_both_fit_the_rows_decide_then_the_time(
    paired: Difference, zo_seconds: float, expected: str, words: str
) -> None:
    use, said = advice(cell("zo/none", 0.93, seconds=zo_seconds), BACKPROP, paired=paired)
    assert use == expected
    assert words in said


def test_the_best_of_each_method_that_fits_is_taken() -> None:
    use, said = advice(ZO, cell("zo/lora", 0.89, mib=600), BACKPROP, cell("backprop/none", 0.99, mib=4000), limit=2**30)
    assert use == "backprop/lora"
    assert "zo/lora" in said and "zo/none" not in said


def test_a_lower_loss_is_the_better_one() -> None:
    cells = [replace(c, metrics={"loss": c.metrics["accuracy"]}) for c in (ZO, BACKPROP)]
    found = advise("loss", cells, None, differ(-0.08, -0.02))
    assert found is not None and found.use == "zo/none"


def test_a_baseline_that_is_as_good_is_told() -> None:
    against = {"baseline": "tfidf", "difference": 0.01, "low": -0.01, "high": 0.03, "p_value": 0.4, "clear": False}
    _, said = advice(ZO, cell("backprop/lora", 0.92, against_best_baseline=against))
    assert said.endswith("But it is not clearly better than the baseline tfidf.")


def test_a_baseline_that_is_better_is_told_as_such() -> None:
    against = {"baseline": "probe", "difference": -0.5, "low": -0.8, "high": -0.2, "p_value": 0.0, "clear": True}
    _, said = advice(ZO, cell("backprop/lora", 0.92, against_best_baseline=against))
    assert said.endswith("But the baseline probe is clearly better.")


def test_without_both_methods_there_is_nothing_to_advise() -> None:
    assert advise("accuracy", [BASELINE, ZO], None, differ(0, 1)) is None
    assert advise("accuracy", [BASELINE, BACKPROP], None, differ(0, 1)) is None
