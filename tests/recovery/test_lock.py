"""A run folder has one writer at a time, and a writer that died does not stand in the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tunefork.errors import RunError
from tunefork.run import RunFolder

HOLD = "import sys, pathlib; from tunefork.files import FolderLock; lock = FolderLock(pathlib.Path(sys.argv[1])); " + (
    "print('held', flush=True); sys.stdin.read()"
)
SRC = Path(__file__).resolve().parents[2] / "src"


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock of `folder` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RunFolder.create(tmp_path / "run", "task: sst2\n").close()
    return tmp_path / "run"


def test_a_second_process_is_refused_by_folder_and_pid(folder: Path) -> None:
    with holder(folder) as other:
        for attempt in (lambda: RunFolder.open(folder, write=True), lambda: RunFolder.create(folder, "task: mr\n")):
            with pytest.raises(RunError) as caught:
                attempt()
            assert str(folder) in str(caught.value)
            assert f"Process {other.pid} " in str(caught.value)
            assert caught.value.exit_code == 2
        assert (folder / "recipe.yaml").read_text() == "task: sst2\n"
        assert RunFolder.open(folder, write=False).read_log() == []  # reading is free
    with RunFolder.open(folder, write=True) as run:
        run.append_log(1, "step", {})


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_the_lock_of_a_killed_process_does_not_block(folder: Path) -> None:
    with holder(folder) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (folder / ".lock").exists()
    with RunFolder.open(folder, write=True) as run:
        run.append_log(1, "step", {})


def test_a_lock_file_from_another_machine_or_time_does_not_block(folder: Path) -> None:
    for text in ("", "{", '{"pid": 1, "host": "gone"}'):
        (folder / ".lock").write_text(text)
        RunFolder.open(folder, write=True).close()


def test_two_writers_in_one_process_are_refused_too(folder: Path) -> None:
    with RunFolder.open(folder, write=True), pytest.raises(RunError, match=f"Process {os.getpid()} "):
        RunFolder.open(folder, write=True)
    RunFolder.open(folder, write=True).close()


def test_after_closing_nothing_is_written(folder: Path) -> None:
    run = RunFolder.open(folder, write=True)
    run.close()
    run.close()
    for write in (lambda: run.append_log(1, "step", {}), lambda: run.write_result({}), lambda: run.truncate_log(0)):
        with pytest.raises(RunError, match="open for writing"):
            write()
