"""Bad inputs of every kind: exit code 2 (1 where it is a failure), one clear message, nothing written."""

from __future__ import annotations

import errno
import json
import resource
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli import bad_files, bad_recipes, bad_runs
from tests.cli.bad_files import CSV
from tests.cli.places import Case, Place, tree
from tests.cli.scenes import Command, reviews
from tunefork.files import LEFTOVERS
from tunefork.models import save_artefact

FINETUNE = import_module("tunefork.workflows.finetune")  # a function of this name hides the module
CASES = (*bad_files.CASES, *bad_recipes.CASES, *bad_runs.CASES)


def test_there_are_enough_of_them() -> None:
    names = [case.name for case in CASES]
    assert len(names) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input(case: Case, place: Place, tunefork: Command) -> None:
    arguments = case.arguments(place)
    before = tree(place.folder)
    said = tunefork(*arguments)
    assert said.code == case.code
    for fragment in case.says:
        assert fragment.format(folder=place.folder) in said.sentence
    assert "Traceback" not in said.err
    assert "Something unexpected" not in said.err
    assert said.out == ""
    if not case.writes:
        assert tree(place.folder) == before


def test_a_byte_order_mark_is_no_bad_input(place: Place, tunefork: Command) -> None:
    said = tunefork(*place.train_on("a.csv", b"\xef\xbb\xbf" + CSV.encode(), "--dry-run"))
    assert said.code == 0
    assert "byte-order mark, which was skipped" in said.err


@pytest.mark.parametrize("words", [220_000, pytest.param(2_000_000, marks=pytest.mark.slow)])
def test_a_line_of_megabytes_is_cut_and_said(words: int, place: Place, tunefork: Command) -> None:
    long = CSV + "word " * words + ",good\n"
    said = tunefork(*place.train_on("a.csv", long, "--set", "data.max_cut=0.5", "--dry-run"))
    assert said.code == 0
    assert "more than a million characters, kept" in said.err
    assert "1 row cut to fit" in said.err
    assert "never the answer" in said.err


def test_markup_in_rows_names_and_labels_is_only_text(place: Place, tunefork: Command) -> None:
    rows = reviews(labels=["[/good]", "[red]bad[/]"])
    said = tunefork(*place.train_on("[b]rows[/].csv", rows, "--out", place.folder / "[/out]"))
    assert said.code == 0, said.err
    assert "[/good] " in said.err
    assert "[b]rows[/].csv" in said.err
    assert (place.folder / "[/out]" / "result.json").is_file()


def test_a_full_disk_leaves_a_run_that_goes_on(place: Place, tunefork: Command) -> None:
    with pytest.MonkeyPatch.context() as patch:
        failing = Place(place.folder, place.tiny, place.kept, patch)
        assert tunefork(*bad_runs.refusing(failing, "write", errno.ENOSPC, 40)).code == 1
    assert [p.name for p in (place.folder / "out" / "checkpoints").iterdir()] in ([], ["step-00000000"])
    said = tunefork("train", "--resume", "--out", place.folder / "out", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["steps"] == 2


def test_a_disk_that_is_full_when_the_model_is_kept(place: Place, tunefork: Command) -> None:
    """The system itself refuses the write, inside the library that makes it."""

    def too_large(*arguments: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            save_artefact(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FINETUNE, "save_artefact", too_large)
        said = tunefork(*place.train())
    assert said.code == 1
    assert "The disk must have room" in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    out = place.folder / "out"
    assert not (out / "model").exists()
    assert [p.name for p in out.iterdir() if p.name.startswith(LEFTOVERS)] == []
    assert tunefork("train", "--resume", "--out", out, "--json").code == 0


def test_a_flipped_byte_is_said_and_the_older_checkpoint_used(place: Place, tunefork: Command) -> None:
    arguments = place.resume()
    run = bad_runs.damage(place.folder / "kept", 2)
    said = tunefork(*arguments)
    assert said.code == 0, said.err
    assert "skipped" in said.err
    assert "step-00000002: weights.safetensors does not have the checksum" in said.sentence
    assert "resumed at step 1" in said.err
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (run, place.kept))
    assert ours == theirs


def test_weights_that_are_no_numbers_end_the_run_with_a_sentence(place: Place, tunefork: Command) -> None:
    model = place.model()
    weights = load_file(model / "model.safetensors")
    save_file({name: torch.full_like(w, torch.nan) for name, w in weights.items()}, model / "model.safetensors")
    said = tunefork(*place.train("--model", model))
    assert said.code == 1
    assert "Traceback" not in said.err
    assert "finite" in said.err


def test_what_nobody_foresaw_is_a_sentence_and_the_traceback_is_in_files(place: Place, tunefork: Command) -> None:
    def broken(*arguments: Any, **more: Any) -> None:
        raise ZeroDivisionError("a bug")

    place.patch.setattr(FINETUNE, "save_artefact", broken)
    said = tunefork(*place.train())
    assert said.code == 1
    assert "Something unexpected failed: ZeroDivisionError: a bug" in said.err
    assert "Traceback" not in said.err
    named = Path(said.err.rsplit("The traceback is in ", 1)[1].strip())
    assert "ZeroDivisionError" in named.read_text()
    assert "ZeroDivisionError" in (place.folder / "out" / "error.log").read_text()
    named.unlink()
