"""A stand-in for the module `os` inside tunefork.files: it counts the calls that matter and dies or fails at one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "ftruncate", "replace", "mkdir", "makedirs", "unlink", "rmdir")
WHEN = ("before", "half", "after")


class Killed(BaseException):
    """What a kill is within one process: nothing catches it."""


class WatchedOs:
    """Calls are numbered from 0. A dead process makes no calls: after a kill each one raises Killed and does nothing.

    die_at, when: kill before or after that call, or when half of a write is written.
    fail, errno: calls for which `fail(number, name)` holds raise that OSError instead.
    takes: bytes that one write takes at most, as the system may.
    really_sync: flush for real; a kill, unlike a loss of power, does not need it.
    """

    def __init__(
        self,
        *,
        die_at: int | None = None,
        when: str = "before",
        die: Callable[[], None] | None = None,
        fail: Callable[[int, str], bool] | None = None,
        errno: int = 0,
        takes: int | None = None,
        really_sync: bool = False,
    ) -> None:
        self.die_at, self.when, self.die = die_at, when, die
        self.fail, self.errno, self.takes, self.really_sync = fail, errno, takes, really_sync
        self.calls: list[str] = []
        self.trace: list[tuple[str, Any]] = []  # (name, path or paths); writes and fsyncs by the path of their file
        self.dead = False
        self._open: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "close":
            return self._close
        real = getattr(os, name)
        return partial(self._call, name, real) if name in CALLS else real

    def _call(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.dead:
            raise Killed
        number = len(self.calls)
        self.calls.append(name)
        if self.fail is not None and self.fail(number, name):
            if name == "write":  # a disk that fills up takes what still fits
                os.write(args[0], args[1][: len(args[1]) // 2])
            raise OSError(self.errno, os.strerror(self.errno))
        dies = number == self.die_at
        if dies and self.when == "before":
            self._kill()
        if dies and self.when == "half" and name == "write":
            os.write(args[0], args[1][: len(args[1]) // 2])
            self._kill()
        if name == "write" and self.takes is not None:
            args = (args[0], args[1][: self.takes])
        skipped = name == "fsync" and not self.really_sync
        result: Any = None if skipped else real(*args, **kwargs)
        if name == "open":
            self._open[result] = str(args[0])
        place = self._open.get(args[0]) if name in ("write", "fsync", "ftruncate") else str(args[0])
        self.trace.append((name, (place, str(args[1])) if name == "replace" else place))
        if dies:
            self._kill()
        return result

    def _close(self, descriptor: int) -> None:
        if not self.dead:
            self._open.pop(descriptor, None)
            os.close(descriptor)

    def _kill(self) -> None:
        if self.die is not None:
            self.die()
        self.dead = True
        for descriptor in self._open:  # the kernel does this for a process that ends; locks go with it
            os.close(descriptor)
        self._open.clear()
        raise Killed


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below a folder, the lock's file left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(folder: Path) -> list[str]:
    """Every file and folder below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
