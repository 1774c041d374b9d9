"""A PostgreSQL of one's own on a free loopback port, where its programs and a driver are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from tests.server.scenes import free_port, wait_for
from tunefork.server.store import new_id

DRIVER = "psycopg"


def _program(name: str) -> str | None:
    """In PATH, or where Debian has those that are no commands; the newest."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return str(found[-1]) if found else shutil.which(name)


@contextmanager
def postgres() -> Iterator[Callable[[], str]]:
    """Gives a function that makes a database and returns its URL. Skips the test where there is no PostgreSQL."""
    initdb, server = _program("initdb"), _program("postgres")
    if not (initdb and server and importlib.util.find_spec(DRIVER)):
        pytest.skip("PostgreSQL's programs and psycopg are needed")
    root = os.name == "posix" and os.geteuid() == 0  # whom it refuses to serve
    owner: Any = {"user": "postgres", "group": "postgres", "extra_groups": []} if root else {}
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o777)
        command = [initdb, "-D", f"{folder}/data", "-U", "tester", "-A", "trust"]
        made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, **owner)
        if made.returncode:
            pytest.skip(f"initdb: {made.stderr.strip()}")
        command = [server, "-D", f"{folder}/data", "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
        with Path(f"{folder}/log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **owner)
        base = f"postgresql+{DRIVER}://tester@127.0.0.1:{port}/"
        engine = create_engine(f"{base}postgres", isolation_level="AUTOCOMMIT")

        def ready() -> bool:
            try:
                with engine.connect():
                    return True
            except OperationalError:
                assert process.poll() is None, Path(f"{folder}/log").read_text()
                return False

        def database() -> str:
            name = new_id("db").lower()
            with engine.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {name}"))
            return base + name

        try:
            wait_for(ready)
            yield database
        finally:
            engine.dispose()
            process.send_signal(signal.SIGINT)  # now, and not when its last client has left
            process.wait(30)
