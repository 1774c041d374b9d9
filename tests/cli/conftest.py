"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.places import Place
from tests.cli.scenes import Command, put, reviews, said_by


@pytest.fixture
def tunefork(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls the command line's entry in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: said_by(arguments, capsys)


@pytest.fixture(scope="session")
def kept_run(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with both checkpoints. Copy it before you touch it."""
    folder = tmp_path_factory.mktemp("kept")
    recipe = {
        "model": str(tiny("llama")),
        "task": "classification",
        "data": {"train": str(put(folder / "train.csv", reviews()))},
        "train": {"max_steps": 2, "save_every": 1},
        "evaluate": {"baselines": ["majority"], "bootstrap": 100},
        "adapter": "none",
        "out": str(folder / "run"),
        "seed": 3,
    }
    from tunefork import finetune

    return finetune(recipe).path


@pytest.fixture
def place(tmp_path: Path, tiny: Callable[[str], Path], kept_run: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tiny, kept_run, monkeypatch)
