"""A damaged checkpoint is never used: it is named with the reason, and the newest good one takes its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.recovery import scenes
from tests.recovery.scenes import is_checkpoint
from tunefork.errors import RecipeError, RunError, UnsupportedError
from tunefork.run import RunFolder
from tunefork.train.checkpoint import environment, environment_differences, load_newest, load_step, save_checkpoint

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
FILES = ("weights.safetensors", "method.safetensors", "state.json", "manifest.json")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.make_run(tmp_path_factory.mktemp("damage") / "run", (5, 10))


def damage(file: Path, how: str, where: float, mask: int) -> None:
    data = file.read_bytes()
    at = min(int(where * len(data)), len(data) - 1)
    if how == "remove":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(data[:at])
    elif how == "grow":
        file.write_bytes(data + bytes([mask]))
    else:
        file.write_bytes(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(FILES),
    how=st.sampled_from(("flip", "flip", "flip", "truncate", "remove", "grow")),
    where=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
)
def test_any_damage_to_the_newest_is_seen_and_the_older_one_used(
    template: Path, tmp_path_factory: pytest.TempPathFactory, name: str, how: str, where: float, mask: int
) -> None:
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(template, folder)
    newest = folder / "checkpoints" / "step-00000010"
    damage(newest / name, how, where, mask)
    loaded = load_newest(RunFolder.open(folder, write=False))
    assert is_checkpoint(loaded, 5, 5)
    assert loaded is not None
    assert [path for path, _ in loaded.skipped] == [newest]
    assert name in loaded.skipped[0][1]
    shutil.rmtree(folder)


def test_every_byte_of_the_manifest_counts(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run", write=False)
    file = run.checkpoint_path(10) / "manifest.json"
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        loaded = load_newest(run)
        assert loaded is not None
        assert loaded.step == 5, at


def test_all_damaged_is_an_error_that_names_each(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run", write=False)
    (run.checkpoint_path(5) / "weights.safetensors").unlink()
    (run.checkpoint_path(10) / "state.json").write_text("{}")
    with pytest.raises(RunError, match=r"step-00000010: state\.json has 2 bytes.*step-00000005: weights.*missing"):
        load_newest(run)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "task: sst2\n") as run:
        assert load_newest(run) is None


def test_a_checkpoint_under_another_steps_name_is_not_used(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run", write=False)
    run.checkpoint_path(10).rename(run.checkpoint_path(30))
    loaded = load_newest(run)
    assert is_checkpoint(loaded, 5, 5)
    assert loaded is not None
    assert loaded.skipped == ((run.checkpoint_path(30), "it was written as step 10"),)


def test_a_save_after_a_fallback_removes_what_was_skipped_and_keeps_the_good_one(
    template: Path, tmp_path: Path
) -> None:
    """Were the damaged one counted among the newest two, the only good one would be pruned."""
    shutil.copytree(template, tmp_path / "run")
    with RunFolder.open(tmp_path / "run", write=True) as run:
        (run.checkpoint_path(10) / "state.json").unlink()
        loaded = load_newest(run)
        assert is_checkpoint(loaded, 5, 5)
        save_checkpoint(run, 8, scenes.tensors(8), scenes.state(8), keep=2)
        assert run.checkpoint_steps() == [5, 8]
        assert is_checkpoint(load_newest(run), 8, 8)


def test_the_newest_are_kept_and_the_protected(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "task: sst2\n") as run:
        for step in range(1, 8):
            save_checkpoint(
                run, step, scenes.tensors(step), scenes.state(step), keep=2, protect={3} if step >= 3 else ()
            )
        assert run.checkpoint_steps() == [3, 6, 7]
        assert is_checkpoint(load_step(run, 3), 3, 3)


def test_a_missing_or_damaged_step_is_refused_by_name(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run", write=False)
    with pytest.raises(RunError, match=r"step 7 must be whole.*no such folder.*there: 5, 10"):
        load_step(run, 7)
    (run.checkpoint_path(5) / "method.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"method\.safetensors has 0 bytes"):
        load_step(run, 5)


def test_saving_needs_the_right_to_write_and_something_to_keep(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "run")
    with pytest.raises(RunError, match="open for writing"):
        save_checkpoint(RunFolder.open(tmp_path / "run", write=False), 11, {}, {}, keep=1)
    with RunFolder.open(tmp_path / "run", write=True) as run, pytest.raises(RecipeError, match="keep_checkpoints"):
        save_checkpoint(run, 11, {}, {}, keep=0)


def test_a_number_format_that_cannot_be_kept_is_refused_and_leaves_nothing(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "run")
    with RunFolder.open(tmp_path / "run", write=True) as run:
        before = sorted(run.checkpoints_path.iterdir())
        with pytest.raises(UnsupportedError, match=r"complex64 \(w\)"):
            save_checkpoint(run, 11, {"weights": {"w": torch.zeros(2, dtype=torch.complex64)}}, {}, keep=1)
        assert sorted(run.checkpoints_path.iterdir()) == before


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_any_tensors_come_back_bit_for_bit_and_the_files_are_plain_safetensors(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtypes: list[torch.dtype], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = {
        f"ж{i}": (torch.randn(shape, generator=generator) * 9).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    with RunFolder.create(tmp_path_factory.mktemp("run") / "run", "task: sst2\n") as run:
        path = save_checkpoint(run, 1, {"weights": group}, {}, keep=1)
        loaded = load_newest(run)
    assert loaded is not None
    assert scenes.same(loaded.tensors, {"weights": group})
    assert scenes.same({"w": load_file(path / "weights.safetensors")}, {"w": group})
    shutil.rmtree(run.path)


def test_not_a_number_comes_back_with_its_bits(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, -1, 0x7F800000], dtype=torch.int32)
    with RunFolder.create(tmp_path / "run", "task: sst2\n") as run:
        save_checkpoint(run, 1, {"weights": {"w": bits.view(torch.float32)}}, {}, keep=1)
        loaded = load_newest(run)
    assert loaded is not None
    assert torch.equal(loaded.tensors["weights"]["w"].view(torch.int32), bits)


def test_differences_of_the_environment_are_said_in_words() -> None:
    now = environment(torch.device("cpu"), "fp32")
    assert json.loads(json.dumps(now)) == now
    assert environment_differences(now, environment(torch.device("cpu"), "fp32")) == []
    then = {**now, "threads": 64, "torch": "2.8.0", "bitsandbytes": None}
    said = environment_differences(then, {**now, "bitsandbytes": "0.50"})
    assert len(said) == 3
    assert any("`threads` was 64" in line and f"is {torch.get_num_threads()} now" in line for line in said)
    assert any("`bitsandbytes` was not there" in line for line in said)
