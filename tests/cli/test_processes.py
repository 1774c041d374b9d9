"""What only a process of its own can show: exit codes of signals, closed pipes, plain terminals, quick answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.places import Place
from tunefork import __version__
from tunefork.run import RunFolder

SRC = Path(__file__).resolve().parents[2] / "src"
TUNEFORK = [sys.executable, "-m", "tunefork"]


def surroundings(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "COLUMNS": "80", **more}


def ran(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    given = [str(argument) for argument in arguments]
    return subprocess.run(
        [*TUNEFORK, *given], capture_output=True, text=True, timeout=600, env=surroundings(), check=False, **more
    )


def test_help_and_version_answer_without_pytorch() -> None:
    script = (
        "import sys\nfrom tunefork.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'matplotlib', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    for arguments in (["--help"], ["--version"], ["train", "--help"], ["data", "show", "--help"], ["train", "--sett"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=surroundings(), check=False
        )
        assert done.returncode == 0, done.stderr
    assert ran("--version").stdout == f"tunefork {__version__}\n"


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("command", [[], ["train"], ["data", "show"], ["compare"]], ids="-".join)
def test_help_fits_the_terminal(width: str, command: list[str]) -> None:
    done = subprocess.run(
        [*TUNEFORK, *command, "--help"], capture_output=True, text=True, env=surroundings(COLUMNS=width), check=False
    )
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= int(width)
    assert "…" not in done.stdout.replace("VALUE=NAME,…", "")  # nothing is cut


def test_a_bad_input_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = ran("train", "--task", "sst2", "--train", "none.csv", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "tunefork: A file of rows must exist. Received `none.csv`, which does not.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_writes(place: Place) -> None:
    folder = place.run(finished=False)
    with RunFolder.open(folder, write=True):
        done = ran("train", "--resume", "--out", folder)
    assert done.returncode == 2
    assert f"Process {os.getpid()} on " in done.stderr
    assert "Try again when it has ended" in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_says_how_to_go_on_and_exits_130(stop: signal.Signals, place: Place) -> None:
    out = place.folder / "out"
    training = subprocess.Popen(
        [*TUNEFORK, *map(str, place.train("--max-steps", 5000, "--set", "train.save_every=5000"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings(),
    )
    log = out / "log.jsonl"
    started = time.monotonic()
    while not (log.exists() and '"step", "loss"' in log.read_text()) and time.monotonic() - started < 600:
        time.sleep(0.05)
    training.send_signal(stop)
    said, problem = training.communicate(timeout=600)
    assert training.returncode == 130
    assert said == ""
    assert "Traceback" not in problem
    assert re.search(rf"tunefork: Stopped by {stop.name}. Steps up to [\d,]+ are saved in {out}; --resume", problem)
    with RunFolder.open(out, write=False) as run:
        start, stopped = run.checkpoint_steps()
        assert start == 0 < stopped


@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_a_signal_while_the_command_still_loads_exits_130_without_a_traceback(stop: str) -> None:
    code = (
        "import os, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'tunefork.cli.app': os.kill(os.getpid(), signal.{stop})\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from tunefork.cli import main\n"
        "main(['methods'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=surroundings(), timeout=600, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["none", "zo/none"])
def test_a_comparison_that_is_interrupted_keeps_its_cells_and_goes_on(first: str, place: Place) -> None:
    """The signal comes to the command alone, as from `kill`; each process that it started ends with it."""
    more = ("--max-steps", 300, "--set", "evaluate.baselines=[majority]", "--methods", f"{first},lora")
    command = [*TUNEFORK, "compare", *map(str, place.train(*more)[1:])]
    comparing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings())
    out = place.folder / "out"
    log, kept = out / "cells" / first.replace("/", "-") / "log.jsonl", out / "comparison.json"
    started = time.monotonic()
    while not (log.exists() and '"step", "loss"' in log.read_text()) and time.monotonic() - started < 600:
        time.sleep(0.05)
    assert [cell["name"] for cell in json.loads(kept.read_text())["cells"]] == ["majority"]
    before = (out / "cells" / "majority" / "predictions" / "test.jsonl").stat().st_mtime_ns
    comparing.send_signal(signal.SIGINT)
    said, problem = comparing.communicate(timeout=600)
    assert (comparing.returncode, said) == (130, "")
    assert f"Stopped by SIGINT. 1 of 3 cells are measured and kept in {out}; the same command" in problem
    assert "majority: accuracy" in problem

    again = subprocess.run(command, capture_output=True, text=True, env=surroundings(), timeout=600, check=False)
    assert again.returncode == 0, again.stderr
    assert [(c["name"], c["error"]) for c in json.loads(again.stdout)["cells"]] == [
        ("majority", None),
        (first, None),
        ("lora", None),
    ]
    assert (out / "cells" / "majority" / "predictions" / "test.jsonl").stat().st_mtime_ns == before
    assert '"kind": "resume"' in log.read_text()


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_chat_says_nothing_but_the_reply(temperature: str, place: Place) -> None:
    """Libraries warn on a stderr that only a process of its own shows."""
    done = ran("chat", place.tiny("llama"), "--max-new-tokens", "3", "--temperature", temperature, input="Hello\n")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["--help", pytest.param("tasks", marks=pytest.mark.slow)])
def test_a_reader_that_leaves_early_is_no_error(command: str) -> None:
    """As in `tunefork tasks | head -1`."""
    said = subprocess.Popen([*TUNEFORK, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=surroundings())
    assert said.stdout is not None
    assert said.stderr is not None
    said.stdout.close()
    assert said.stderr.read() == b""
    assert said.wait(timeout=600) in (0, 1)


def test_a_terminal_that_knows_only_ascii() -> None:
    done = subprocess.run(
        [*TUNEFORK, "train", "--help"], capture_output=True, env=surroundings(PYTHONIOENCODING="ascii"), check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"--labels" in done.stdout
