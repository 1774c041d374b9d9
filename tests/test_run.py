"""A run folder: what it refuses to be made in, its log, its result."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tunefork.errors import MissingFileError, RunError
from tunefork.files import staged_folder
from tunefork.run import RESULT_SCHEMA, RunFolder
from tunefork.train.checkpoint import save_checkpoint

RECIPE = "task: sst2\n"


def new_run(folder: Path) -> RunFolder:
    return RunFolder.create(folder, RECIPE)


def test_a_new_run_may_be_nested_and_is_readable_as_text(tmp_path: Path) -> None:
    with new_run(tmp_path / "a" / "b") as run:
        assert run.recipe_path.read_text() == RECIPE
        assert not run.finished
        assert run.checkpoint_steps() == []
    (tmp_path / "empty").mkdir()
    new_run(tmp_path / "empty").close()


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")  # a person's own recipe is not a run
    (tmp_path / "train.csv").write_text("a,b\n")
    with pytest.raises(RunError, match=r"needs an empty folder.*2 other things, recipe.yaml among them"):
        new_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "train.csv"]
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    with pytest.raises(RunError, match=r"must hold recipe.yaml and log.jsonl"):
        RunFolder.open(tmp_path, write=True)


def test_a_finished_run_and_one_that_can_go_on_are_not_replaced(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        save_checkpoint(run, 7, {"weights": {"w": torch.ones(2)}}, {}, keep=1)
    with pytest.raises(RunError, match=r"checkpoint of step 7. Try --resume"):
        new_run(tmp_path / "run")
    with RunFolder.open(tmp_path / "run", write=True) as run:
        run.write_result({"steps": 7})
    with pytest.raises(RunError, match=r"is finished. Try another --out"):
        new_run(tmp_path / "run")
    assert RunFolder.open(tmp_path / "run", write=False).read_result()["steps"] == 7


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_over(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.append_log(3, "step", {"loss": 1.0})
    with RunFolder.create(tmp_path / "run", "task: mr\n") as run:
        assert run.read_log() == []
        assert run.recipe_path.read_text() == "task: mr\n"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere"):
        RunFolder.open(tmp_path / "nowhere", write=False)


def test_reading_changes_nothing(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    (tmp_path / "run" / ".tmp-1-x").write_text("being written by someone else")
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "kind": "step"}\n{"step": 2')
    run = RunFolder.open(tmp_path / "run", write=False)
    assert [entry["step"] for entry in run.read_log()] == [1]
    assert (tmp_path / "run" / ".tmp-1-x").exists()
    assert run.log_path.read_text().endswith('{"step": 2')
    with pytest.raises(RunError, match="open for writing"):
        run.append_log(2, "step", {})


@given(cut=st.integers(0, 200), step=st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_a_torn_log_is_repaired_and_cut_to_its_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, cut: int, step: int
) -> None:
    folder = tmp_path_factory.mktemp("log") / "run"
    with new_run(folder) as run:
        for number in range(1, 6):
            run.append_log(number, "step", {"loss": 1 / number, "text": "ж\n"})
    whole = run.log_path.read_bytes()
    run.log_path.write_bytes(whole[: max(0, len(whole) - cut)])
    lines = whole[: max(0, len(whole) - cut)].split(b"\n")[:-1]
    with RunFolder.open(folder, write=True) as run:
        assert run.log_path.read_bytes() == b"".join(line + b"\n" for line in lines)
        run.truncate_log(step)
        run.append_log(99, "step", {})
    kept = [json.loads(line) for line in lines if json.loads(line)["step"] <= step]
    assert RunFolder.open(folder, write=False).read_log() == [*kept, {"step": 99, "kind": "step"}]


def test_a_damaged_line_of_the_log_is_said_in_its_place(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        for step in (1, 2, 3):
            run.append_log(step, "step", {})
        lines = run.log_path.read_bytes().split(b"\n")
        run.log_path.write_bytes(b"\n".join([lines[0], b"\0" * 20, *lines[2:]]))
        said = [{"step": 1, "kind": "step"}, {"step": 1, "kind": "damaged", "line": 2}, {"step": 3, "kind": "step"}]
        assert run.read_log() == said
        run.truncate_log(2)
        assert run.read_log() == said[:2]


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.append_log(1, "step", {"loss": math.nan, "nested": {"a": [1.5, math.inf]}, "step": 5})
        assert run.read_log() == [{"step": 1, "kind": "step", "loss": None, "nested": {"a": [1.5, None]}}]
        run.write_result({"test": {"f1": {"value": math.nan}}, "name": "half a pair: \ud83d"})
        result = run.read_result()
    assert result == {"schema": RESULT_SCHEMA, "test": {"f1": {"value": None}}, "name": "half a pair: \ud83d"}
    assert run.finished


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', "\xff"])
def test_a_result_that_cannot_be_read_is_a_sentence(tmp_path: Path, text: str) -> None:
    with new_run(tmp_path / "run") as run, pytest.raises(RunError, match=r"no result\.json"):
        run.read_result()
    run.result_path.write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match="schema"):
        run.read_result()


def test_everything_else_lies_where_it_is_said(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.write_report("<html>")
        assert run.write_predictions("test.jsonl", "{}\n").read_text() == "{}\n"
        assert run.write_error("Traceback ж").read_text(encoding="utf-8") == "Traceback ж"
    expected = {".lock", "checkpoints", "error.log", "log.jsonl", "predictions", "recipe.yaml", "report.html"}
    assert {p.name for p in run.path.iterdir()} == expected


@pytest.mark.skipif(os.name == "nt", reason="no such modes")
def test_who_may_read_a_run_may_read_its_weights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged_folder(tmp_path / "model") as folder:
            save_file({"w": torch.ones(2)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {
        "model.safetensors": 0o640,
        "config.json": 0o640,
    }
