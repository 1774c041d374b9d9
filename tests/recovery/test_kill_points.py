"""A kill before, amid or after any system call of a save: the run has the old checkpoint or the new one and goes on."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recovery import scenes
from tests.recovery.scenes import is_checkpoint
from tests.recovery.watched_os import WHEN, Killed, WatchedOs, names, tree
from tunefork import files
from tunefork.run import RunFolder
from tunefork.train.checkpoint import load_newest, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs that each scene starts from."""
    folder = tmp_path_factory.mktemp("templates")
    starts = {"save_next": scenes.make_run(folder / "next", (5, 10))}
    scenes.add_leftovers(starts["save_next"])
    starts["save_again"] = scenes.make_run(folder / "again", (5, 10, 20))
    return starts


def watch(monkeypatch: pytest.MonkeyPatch, watched: WatchedOs, act: Callable[[Path], None], folder: Path) -> WatchedOs:
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", watched)
        try:
            act(folder)
        except Killed:
            assert watched.dead
    return watched


def assert_same_end(folder: Path, whole: Path) -> None:
    """Every file of the run that was never killed is there, bit for bit.

    More may be only a good older checkpoint, where a kill fell between the last save and its pruning.
    """
    expected, found = tree(whole), tree(folder)
    assert {"result.json", "model/assets/card.md", "checkpoints/step-00000003/manifest.json"} <= set(expected)
    assert {name: found.get(name) for name in expected} == expected
    more = {Path(name).parent for name in found if name not in expected}
    assert more <= {Path("checkpoints/step-00000002")}
    assert not [path for path in more if files.folder_damage(folder / path)]


def check_survival(scene: str, folder: Path) -> None:
    """Reopens a run that was killed during a scene, looks at what it has, and saves once more."""
    with RunFolder.open(folder, write=True) as run:
        loaded = load_newest(run)
        old = (20, 20) if scene == "save_again" else (10, 10)
        new = (20, 21) if scene == "save_again" else (20, 20)
        assert is_checkpoint(loaded, *old) or is_checkpoint(loaded, *new), names(folder)
        assert loaded is not None
        assert not loaded.skipped
        save_checkpoint(run, 30, scenes.tensors(30), scenes.state(30), keep=1, protect={5})
        assert is_checkpoint(load_newest(run), 30, 30)
        assert run.checkpoint_steps() == [5, 30]
    assert not [name for name in names(folder) if Path(name).name.startswith(files.LEFTOVERS)]


@pytest.mark.parametrize("scene", ["save_next", "save_again"])
@pytest.mark.parametrize("when", WHEN)
def test_a_kill_at_every_call_of_a_save_leaves_the_old_or_the_new_checkpoint(
    scene: str, when: str, templates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = getattr(scenes, scene)
    shutil.copytree(templates[scene], tmp_path / "whole")
    calls = watch(monkeypatch, WatchedOs(), act, tmp_path / "whole").calls
    assert set(calls) >= {"open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir"}
    for point, name in enumerate(calls):
        if when == "half" and name != "write":
            continue
        folder = tmp_path / f"{point}"
        shutil.copytree(templates[scene], folder)
        assert watch(monkeypatch, WatchedOs(die_at=point, when=when), act, folder).dead
        check_survival(scene, folder)


@pytest.mark.parametrize("when", WHEN)
def test_a_run_killed_at_any_call_and_resumed_ends_with_the_same_bytes(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch(monkeypatch, WatchedOs(), scenes.live, tmp_path / "whole").calls
    for point, name in enumerate(calls):
        if when == "half" and name != "write":
            continue
        folder = tmp_path / f"{point}"
        assert watch(monkeypatch, WatchedOs(die_at=point, when=when), scenes.live, folder).dead
        assert not watch(monkeypatch, WatchedOs(), scenes.live, folder).dead
        assert_same_end(folder, tmp_path / "whole")


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, WatchedOs(), scenes.live, tmp_path / "whole")
    generator = random.Random(0)
    for number in range(20):
        folder = tmp_path / f"{number}"
        for _ in range(5):  # a resumed run is killed as well, while it cleans up too
            watched = WatchedOs(die_at=generator.randrange(60), when=generator.choice(WHEN))
            watch(monkeypatch, watched, scenes.live, folder)
        watch(monkeypatch, WatchedOs(), scenes.live, folder)
        assert_same_end(folder, tmp_path / "whole")


def test_everything_is_flushed_before_the_rename_that_makes_it_count(
    templates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power keeps a rename and loses what was not flushed before it; no kill can show that."""
    for scene in ("save_next", "save_again"):
        shutil.copytree(templates[scene], tmp_path / scene)
        trace = watch(monkeypatch, WatchedOs(), getattr(scenes, scene), tmp_path / scene).trace
        dirty: set[str] = set()  # files with unflushed bytes, folders with unflushed names
        renames = 0
        for name, place in trace:
            if name in ("write", "ftruncate"):
                dirty.add(place)
            elif name == "fsync":
                dirty.discard(place)
            elif name == "mkdir":
                dirty.add(place)
            elif name == "replace":
                source, target = place
                assert not [path for path in dirty if path.startswith(source)], f"{source} renamed before its flush"
                in_log = [path for path in dirty if path.endswith("log.jsonl")]
                assert not in_log, "a checkpoint whose steps the log may lose"
                dirty.add(str(Path(target).parent))
                renames += 1
            elif name in ("unlink", "rmdir") and ".trash-" not in Path(place).parts[-2]:
                assert str(Path(place).parent) not in dirty, f"{place} deleted before the rename was flushed"
        assert renames >= 2
        assert not {path for path in dirty if not path.endswith(".lock")}


def run_driver(scene: str, template: Path, points: list[tuple[Path, int, str]]) -> list[int]:
    order = {"scene": scene, "template": str(template), "points": [[str(f), n, w] for f, n, w in points]}
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", "tests.recovery.sigkill_driver"],
        input=json.dumps(order),
        env={**os.environ, "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def sigkill_matrix(scene: str, template: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    shutil.copytree(template, folder / "whole")
    calls = watch(monkeypatch, WatchedOs(), getattr(scenes, scene), folder / "whole").calls
    points = [
        (folder / f"{when}-{call}", call, when)
        for when in WHEN
        for call in range(len(calls))
        if when != "half" or calls[call] == "write"
    ][::every]
    assert run_driver(scene, template, points) == [-signal.SIGKILL] * len(points)
    for killed, _, _ in points:
        check_survival(scene, killed)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_sigkill_at_a_handful_of_calls(
    templates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigkill_matrix("save_next", templates["save_next"], tmp_path, monkeypatch, every=11)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("scene", ["save_next", "save_again"])
def test_sigkill_at_every_call(
    scene: str, templates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigkill_matrix(scene, templates[scene], tmp_path, monkeypatch, every=1)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_sigkill_at_random_instants(kills: int, tmp_path: Path) -> None:
    scenes.live(tmp_path / "whole")
    generator = random.Random(1)
    for number in range(kills):
        folder = tmp_path / f"{number}"
        child = os.fork()
        if child == 0:
            try:
                for life in itertools.count():  # a run after the other, so that the kill falls somewhere in one
                    scenes.live(folder / f"{life:06d}")
            finally:
                os._exit(1)  # never back into pytest
        time.sleep(generator.uniform(0.05, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        last = max(folder.iterdir())
        scenes.live(last)
        assert_same_end(last, tmp_path / "whole")
