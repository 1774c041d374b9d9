"""A run measured again: on its own test rows, and on rows it has seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunefork.errors import DataError
from tunefork.run import RunFolder
from tunefork.workflows import evaluate, finetune

LINES = [f"it was {word} number {i},{label}" for i in range(25) for word, label in (("great", "good"), ("poor", "bad"))]


@pytest.fixture(scope="module")
def run(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(LINES) + "\n")
    done = finetune(
        {
            "model": str(tiny("llama")),
            "task": "classification",
            "data": {"train": str(folder / "rows.csv")},
            "train": {"max_steps": 2},
            "evaluate": {"baselines": []},
            "out": str(folder / "run"),
        }
    )
    return done.path


def test_a_run_is_measured_on_its_own_test_rows(run: Path) -> None:
    test = RunFolder.open(run, write=False).read_result()["test"]
    again = evaluate(run)
    assert again.metrics["accuracy"]["n"] == test["accuracy"]["n"] > 0
    assert again.metrics == test


def test_rows_that_it_was_trained_on_are_found(run: Path, tmp_path: Path) -> None:
    train = json.loads((run / "result.json").read_text())["data"]["counts"]["train"]["rows"]
    found = {f.code: f for f in evaluate(run, run.parent / "rows.csv").findings}
    assert found["leaked-exact"].count == train and found["leaked-exact"].level == "warning"
    (tmp_path / "new.csv").write_text("text,label\nsomething else,good\nIT WAS great number 3!,good\n")
    codes = {f.code: f.count for f in evaluate(run, tmp_path / "new.csv").findings}
    assert "leaked-exact" not in codes and codes.get("leaked-normalised", 0) <= 1


def test_training_rows_that_are_gone_are_named(run: Path, tmp_path: Path) -> None:
    rows, aside = run.parent / "rows.csv", run.parent / "aside.csv"
    (tmp_path / "new.csv").write_text("text,label\nsomething else,good\n")
    rows.rename(aside)
    try:
        found = {f.code: f for f in evaluate(run, tmp_path / "new.csv").findings}
    finally:
        aside.rename(rows)
    assert str(rows) in found["unknown-overlap"].message


def test_a_refused_label_column_tells_of_rows_that_could_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "nul.csv").write_text("text,label\n" + "".join(f"a {i},bad\nb\0 {i},good\n" for i in range(20)))
    with pytest.raises(DataError, match=r"'bad' in all of them.*But first: 20 rows"):
        finetune({"task": "classification", "data": {"train": str(tmp_path / "nul.csv")}, "out": str(tmp_path / "run")})
