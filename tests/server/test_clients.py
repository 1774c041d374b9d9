"""The promise under other clients than the installed one, each fetched for the test: `make clients`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.scenes import pip_refuses, server_process, word_ids

SCRIPTS = Path(__file__).parent / "clients"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server_process(tmp_path_factory.mktemp("served") / "data") as (_, url):
        yield url


def said(command: list[str], url: str, path: str = "") -> str:
    """What a script prints that asserts everything itself."""
    surroundings = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [*command, url, "any", *word_ids().values()], env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout, end="")
    return done.stdout


@pytest.mark.parametrize("major", [1, 2, 3])
def test_openai_python(url: str, tmp_path: Path, major: int) -> None:
    """The newest of each major version."""
    if why := pip_refuses("install", "--target", str(tmp_path), f"openai>={major},<{major + 1}"):
        pytest.skip(f"openai {major} cannot be had here ({why})")
    told = said([sys.executable, str(SCRIPTS / "promise.py")], url, str(tmp_path))
    assert told.startswith(f"openai-python {major}.")


def test_openai_of_npm(url: str, tmp_path: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    made = subprocess.run(
        ["npm", "install", "--prefix", str(tmp_path), "openai"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"npm's openai cannot be had here ({made.stderr.strip()[-200:]})")
    shutil.copy(SCRIPTS / "promise.mjs", tmp_path)
    assert "all held" in said(["node", str(tmp_path / "promise.mjs")], url)
