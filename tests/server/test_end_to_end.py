"""The promise: the official client, unchanged, from rows to a model that does what it was taught; a real process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.clients import promise
from tests.server.scenes import client_of, server_process, word_ids


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with server_process(tmp_path_factory.mktemp("served") / "data") as (process, url):
        yield process, url


def test_from_rows_to_a_model_that_has_learned(server: tuple[subprocess.Popen[bytes], str]) -> None:
    promise.learn(client_of(server[1]))


@pytest.mark.slow
def test_a_preference_is_learned(server: tuple[subprocess.Popen[bytes], str]) -> None:
    promise.prefer(client_of(server[1]), word_ids())


def test_the_server_ends_when_it_is_asked_to(server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = server
    messages: Any = [promise.asked("sea")]
    stream = client_of(url).chat.completions.create(
        model="fork-tiny", messages=messages, stream=True, logit_bias={"2": -100}
    )
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_without_the_extra_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from tunefork.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "serve", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'tunefork[server]'" in done.stderr


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "tunefork", "keys", *words, "--data", str(tmp_path / "data")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    made = json.loads(run("create", "--project", "proj_a", "--scopes", "model.request", "--json"))
    assert made["key"].startswith("sk-tf-")
    run("revoke", made["id"])
    (listed,) = json.loads(run("list", "--json"))
    assert (listed["id"], listed["scopes"]) == (made["id"], ["model.request"])
    assert listed["revoked_at"] is not None
    assert made["key"] not in json.dumps(listed)
