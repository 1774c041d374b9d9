"""Reading a trajectory as a stream, and writing one so that it survives a kill at any instant."""

from __future__ import annotations

import errno
import os
import time
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from tunefork.zo.directions.base import Term
from tunefork.zo.trajectory.format import (
    Header,
    Record,
    TrajectoryError,
    decode_record,
    digest,
    encode_record,
    read_header,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_OPEN: weakref.WeakSet[Trajectory] = weakref.WeakSet()
"""Trajectories that this process writes to."""


class Reader:
    """The finished steps of a trajectory, which another process may still append to.

    Attributes:
        header: what it belongs to.
        steps: whole records found when it was opened.
        torn: bytes behind them, of a record that a kill or a power cut left unfinished.

    Raises TrajectoryError for a file that is no trajectory, is of a newer version, or has a damaged record before a
    good one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.header, start = read_header(file, self.path)
        self._header, self._seal = len(start), start[-4:]
        self._first = self._header + self.header.start
        if size < self._first:
            raise TrajectoryError(
                f"A trajectory's first weights must be whole. {self.path} ends within them. Try a copy of it."
            )
        whole = bisect_right(range(size), size, key=self._offset) - 1
        self.steps: int = sum(1 for _ in self._read(0, whole))
        self.torn = size - self._offset(self.steps)
        if self.steps < self.header.steps:
            raise TrajectoryError(
                f"A copy of a trajectory must have the {self.header.steps:,} steps that it was made with. {self.path} "
                f"has {self.steps:,} whole ones. Try another copy."
            )
        # a bad record with a good one behind it was not torn off at the end: it has been changed
        if any(True for step in range(self.steps + 1, whole) for _ in self._read(step, step + 1)):
            raise TrajectoryError(
                f"Every record of a trajectory must be whole. In {self.path} that of step {self.steps} is damaged, and "
                "later ones are not. Try a copy of the file."
            )

    def start(self) -> dict[str, torch.Tensor]:
        """The weights that training began with and the base does not have. Raises TrajectoryError for damaged ones."""
        if not self.header.start:
            return {}
        with self.path.open("rb") as file:
            file.seek(self._header)
            data = file.read(self.header.start)
        with suppress(SafetensorError):
            tensors = load(data)
            if digest(tensors) == self.header.run.get("start"):
                return tensors
        raise TrajectoryError(
            f"A trajectory's first weights must be whole. Those of {self.path} are damaged. Try a copy of it."
        )

    def copy(self, path: str | Path, steps: int) -> None:
        """Writes the first `steps` steps as a trajectory of their own, which says how many they are."""
        header = replace(self.header, steps=steps)
        encoded = header.encode()
        with self.path.open("rb") as file, Path(path).open("wb") as other:
            file.seek(self._header)
            other.write(encoded + file.read(self.header.start))
            for record in self._read(0, steps):
                other.write(encode_record(header, encoded[-4:], *record))

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The records of steps start .. stop (None: all there are), read as they are used."""
        return self._read(start, self.steps if stop is None else min(stop, self.steps))

    def _read(self, start: int, stop: int) -> Iterator[Record]:
        """Records from `start` to the first that is not whole."""
        with self.path.open("rb") as file:
            file.seek(self._offset(start))
            for step in range(start, stop):
                record = decode_record(self.header, self._seal, step, file.read(self.header.size(step)))
                if record is None:
                    return
                yield record

    def _offset(self, step: int) -> int:
        """Where the record of `step` begins: records grow until the window is full."""
        queries, window = self.header.queries, self.header.window
        growing = min(step, window)
        rows = growing * (growing + 1) // 2 + (step - growing) * window
        return self._first + 4 * (step * (3 + queries) + rows * queries)


class Trajectory(Reader):
    """A trajectory that a run appends to: a new one, or an old one, whose torn end is cut off.

    Each record is one write. The disk is told to keep what it was given (fsync) at most every `sync_seconds`, at `sync`
    and at `close`: a killed process loses at most the record that it was writing, a power cut that many seconds.

    `start` are weights that a new one keeps besides, see `Reader.start`.

    Attributes:
        changes: entries of the environment that differ from those it was begun in, as (name, then, now).

    Raises TrajectoryError where the file belongs to another run.
    """

    def __init__(
        self,
        path: str | Path,
        header: Header,
        start: Mapping[str, torch.Tensor] | None = None,
        *,
        sync_seconds: float = 5.0,
    ) -> None:
        if start:
            header = replace(header, run={**header.run, "start": digest(start)})
        path = Path(path).absolute()  # it is opened again and again
        if path.is_dir() or not path.parent.is_dir():
            raise TrajectoryError(
                f"A trajectory must be a file in a folder that is there. Received {path}. Try another path, or make "
                f"{path.parent} first."
            )
        if not path.exists():
            weights = save({k: v.detach().cpu().contiguous() for k, v in start.items()}) if start else b""
            _create(path, replace(header, start=len(weights)).encode() + weights)
        self._file = path.open("r+b", buffering=0)
        try:
            self._lock(path)
            super().__init__(path)
            difference = self.header.difference(header)
            if difference:
                raise TrajectoryError(
                    f"A run must go on in its own trajectory. {path} is of another: {difference}. Try another file."
                )
        except BaseException:
            self._file.close()
            raise
        then, now = self.header.environment, header.environment
        self.changes = [(n, then.get(n), now.get(n)) for n in sorted({*then, *now}) if then.get(n) != now.get(n)]
        self.sync_seconds = sync_seconds
        if self.torn:
            self._file.truncate(self._offset(self.steps))
        self.sync()
        _OPEN.add(self)

    def _lock(self, path: Path) -> None:
        """Keeps other processes from writing. Within this one, where an exception may hold on to an optimizer that is
        given up, `append` sees a second writer by itself."""
        about = os.fstat(self._file.fileno())
        self.key, self.process = (about.st_dev, about.st_ino), os.getpid()
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not any(log.key == self.key and log.process == os.getpid() for log in _OPEN):
                raise TrajectoryError(
                    f"A trajectory must have one writer. {path} is another process's. Try once that has ended, or "
                    "another path."
                ) from None
        except OSError:
            pass  # a file system without locks

    def append(self, loss: float, gradients: np.ndarray, terms: Sequence[Term]) -> None:
        """Writes the next step's record.

        Raises OSError where the disk is full, TrajectoryError where another has written here; the file stays as it was.
        """
        data = encode_record(self.header, self._seal, self.steps, loss, gradients, terms)
        end = self._offset(self.steps)
        if self._file.seek(0, os.SEEK_END) != end:
            raise TrajectoryError(
                f"A trajectory must have one writer. {self.path} has been written to since step {self.steps} by "
                "another. Try a file for each."
            )
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._file.truncate(end)
            raise
        self.steps += 1
        if time.monotonic() - self._synced >= self.sync_seconds:
            self.sync()

    def sync(self) -> None:
        """Returns once every record is on the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            if fcntl is not None and self.process == os.getpid():
                with suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone leaves it with processes that were forked
            self._file.close()
            _OPEN.discard(self)

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _create(path: Path, content: bytes) -> None:
    """A new file, whole and on the disk, unless another process has made one meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # a rename would take the place of that other's
        except FileExistsError:
            return
        except OSError:  # a file system without links
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
