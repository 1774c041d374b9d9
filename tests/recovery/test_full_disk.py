"""A disk that is full or may not be written is a sentence, leaves nothing half-written, and is no end of the run."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recovery import scenes
from tests.recovery.scenes import is_checkpoint
from tests.recovery.watched_os import WatchedOs, names, tree
from tunefork import files
from tunefork.errors import RunError, TrainingError, TuneforkError
from tunefork.run import RunFolder
from tunefork.train.checkpoint import load_newest, save_checkpoint

Sabotage = Callable[[WatchedOs], WatchedOs]


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    def put_in(watched: WatchedOs) -> WatchedOs:
        monkeypatch.setattr(files, "os", watched)
        return watched

    return put_in


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.make_run(tmp_path_factory.mktemp("full") / "run", (5, 10))


def save(run: RunFolder, step: int = 20) -> None:
    save_checkpoint(run, step, scenes.tensors(step), scenes.state(step), keep=2)


def test_a_disk_that_fills_up_at_any_write_of_a_checkpoint(template: Path, tmp_path: Path, sabotage: Sabotage) -> None:
    """From the n-th write on nothing fits; half of it did. Then there is room again."""
    for full_from in range(100):
        shutil.copytree(template, tmp_path / f"{full_from}")
        with RunFolder.open(tmp_path / f"{full_from}", write=True) as run:
            before, named = tree(run.path), names(run.path)
            watched = sabotage(WatchedOs())
            watched.fail = lambda _, name, w=watched, n=full_from: name == "write" and w.calls.count("write") > n
            watched.errno = errno.ENOSPC
            try:
                save(run)
            except TrainingError as error:
                assert error.exit_code == 1
                assert "No space left on device" in str(error)
                assert str(run.checkpoint_path(20)) in str(error)
                assert (tree(run.path), names(run.path)) == (before, named)
                sabotage(WatchedOs())
                assert is_checkpoint(load_newest(run), 10, 10)
                save(run)
            else:
                assert full_from > 5  # every write of the checkpoint has had its turn
                return
            finally:
                sabotage(WatchedOs())
            assert is_checkpoint(load_newest(run), 20, 20)
    raise AssertionError("the save never came to its end")


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_any_call_of_a_save_may_fail_once(code: int, template: Path, tmp_path: Path, sabotage: Sabotage) -> None:
    with RunFolder.open(shutil.copytree(template, tmp_path / "whole"), write=True) as run:
        watched = sabotage(WatchedOs())
        save(run)
        sabotage(WatchedOs())
    for point, name in enumerate(watched.calls):
        with RunFolder.open(shutil.copytree(template, tmp_path / f"{point}"), write=True) as run:
            sabotage(WatchedOs(fail=lambda number, _, n=point: number == n, errno=code))
            with pytest.raises(TuneforkError, match=os.strerror(code)):
                save(run)
            sabotage(WatchedOs())
            loaded = load_newest(run)
            assert is_checkpoint(loaded, 10, 10) or is_checkpoint(loaded, 20, 20), (point, name)
            save(run, 30)
            assert is_checkpoint(load_newest(run), 30, 30)


def test_a_failed_line_of_the_log_is_taken_back(template: Path, tmp_path: Path, sabotage: Sabotage) -> None:
    with RunFolder.open(shutil.copytree(template, tmp_path / "run"), write=True) as run:
        before = run.read_log()
        sabotage(WatchedOs(fail=lambda _, name: name == "write", errno=errno.ENOSPC))
        with pytest.raises(TrainingError, match=r"log\.jsonl"):
            run.append_log(11, "step", {"loss": 0.5})
        sabotage(WatchedOs())
        run.append_log(12, "step", {"loss": 0.5})
        assert run.read_log() == [*before, {"step": 12, "kind": "step", "loss": 0.5}]


def test_a_system_that_takes_a_few_bytes_at_a_time_gets_them_all(
    template: Path, tmp_path: Path, sabotage: Sabotage
) -> None:
    with RunFolder.open(shutil.copytree(template, tmp_path / "run"), write=True) as run:
        sabotage(WatchedOs(takes=7))
        run.append_log(20, "step", {"loss": 0.123456789})
        save(run)
        assert is_checkpoint(load_newest(run), 20, 20)
        assert run.read_log()[-1] == {"step": 20, "kind": "step", "loss": 0.123456789}


def test_a_failed_write_of_a_file_leaves_the_old_one(tmp_path: Path, sabotage: Sabotage) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, {"accuracy": 0.5})
    for name in ("open", "write", "fsync", "replace"):
        sabotage(WatchedOs(fail=lambda _, call, n=name: call == n, errno=errno.ENOSPC))
        with pytest.raises(TrainingError):
            files.write_json(path, {"accuracy": 0.9})
        sabotage(WatchedOs())
        assert path.read_text() == '{\n  "accuracy": 0.5\n}\n'
        assert names(tmp_path) == ["result.json"]


def test_a_staged_folder_that_fails_is_gone_and_the_old_one_stays(tmp_path: Path) -> None:
    model = tmp_path / "model"
    with files.staged_folder(model) as folder:
        (folder / "config.json").write_text("{}")
    with pytest.raises(TrainingError, match="room for"), files.staged_folder(model) as folder:
        (folder / "config.json").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ZeroDivisionError), files.staged_folder(model) as folder:
        (folder / "other.json").write_text(str(1 / 0))
    assert tree(tmp_path) == {"model/config.json": b"{}"}
    with files.staged_folder(model) as folder:
        (folder / "weights").write_bytes(b"1")
    assert tree(tmp_path) == {"model/weights": b"1"}
    assert names(tmp_path) == ["model", "model/weights"]


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is(tmp_path: Path, sabotage: Sabotage) -> None:
    sabotage(WatchedOs(fail=lambda _, name: name in ("makedirs", "open"), errno=errno.EACCES))
    with pytest.raises(RunError, match=r"must be writable. Received: Permission denied") as caught:
        RunFolder.create(tmp_path / "run", "task: sst2\n")
    assert caught.value.exit_code == 2
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_for_real(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match="Permission denied"):
            RunFolder.create(tmp_path / "run", "task: sst2\n")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="which is a file"):
        RunFolder.create(tmp_path / "file", "task: sst2\n")
    with pytest.raises(RunError, match=r"file.run"):
        RunFolder.create(tmp_path / "file" / "run", "task: sst2\n")
