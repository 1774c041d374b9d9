"""Writing that survives a kill and a full disk. Every write, fsync, rename and unlink of a run happens in this file.

A file or folder is first made under a temporary name beside its place, flushed to the disk, then renamed, so that a
reader sees the old one or the new one and nothing between. What a kill leaves behind has a name that starts with
`.tmp-`, `.old-` or `.trash-`; `clean_leftovers` deals with it.
"""

# System calls go one by one through `os`, so that a test can fail or kill at each of them.
# ruff: noqa: PTH102, PTH103, PTH105, PTH106, PTH108

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tunefork.errors import RunError, TrainingError, TuneforkError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
LOCK = ".lock"

_TEMPORARY, _OLD, _TRASH = ".tmp-", ".old-", ".trash-"
LEFTOVERS = (_TEMPORARY, _OLD, _TRASH)  # what the names of temporary files and folders start with

_PIECE = 2**24  # bytes hashed and written at a time
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_BINARY = os.O_BINARY if sys.platform == "win32" else 0
_TO_SYNC = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError while working on `path` into a sentence: TrainingError for a full disk, else RunError."""
    try:
        yield
    except TuneforkError:
        raise
    except OSError as error:
        place, why = error.filename or path, error.strerror or str(error)
        if error.errno in _NO_ROOM:
            raise TrainingError(
                f"The disk must have room for {path}. Received: {why}. "
                "Try again after freeing some space; nothing was left half-written."
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise RunError(f"{place} must be writable. Received: {why}. Try another folder for the output.") from error
        raise RunError(f"Writing {path} must succeed. Received: {why} ({place}). Try another folder.") from error


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file so that it holds, whatever happens, its old content or `data` (text as UTF-8)."""
    temporary = _temporary(path)
    with explained(path):
        try:
            _write_file(temporary, [data.encode() if isinstance(data, str) else data])
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                _delete(temporary)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON; numbers that are not finite become null, as JSON has no word for them."""
    write_atomic(path, _json(value, indent=2))


def append_line(path: Path, value: Any) -> None:
    """Adds one line of JSON to a .jsonl file in one write. A write that fails is taken back.

    The line survives a kill of the process at once, and a loss of power from the next `sync_file` on.
    """
    line = _json(value)
    with explained(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, memoryview(line))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def repair_lines(path: Path) -> int:
    """Cuts a last line that a kill left without its line break; returns how many bytes went. No file: 0."""
    with explained(path):
        data = path.read_bytes() if path.exists() else b""
        torn = len(data) - (data.rfind(b"\n") + 1)
        if torn:
            descriptor = os.open(path, os.O_WRONLY | _BINARY)
            try:
                os.ftruncate(descriptor, len(data) - torn)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return torn


def sync_file(path: Path) -> None:
    """Flushes what was written to a file to the disk."""
    with explained(path):
        _sync(path)


def make_folder(path: Path) -> None:
    """Makes a folder and the folders above it, durably. It may be there already."""
    with explained(path):
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        os.makedirs(path, exist_ok=True)
        for folder in reversed(new):
            _sync_folder(folder.parent)


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill. When the block ends it takes `path`'s place, durably; if it raises, it is gone."""
    with _staged(path) as temporary:
        try:
            yield temporary
        except SafetensorError as error:  # it has what the system said in words only
            if code := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            raise
        for folder, _, names in os.walk(temporary):
            for file in (Path(folder, name) for name in names):
                file.chmod(temporary.stat().st_mode & 0o666)  # safetensors writes for the owner alone
                _sync(file)
            _sync_folder(Path(folder))


def write_folder(path: Path, contents: Mapping[str, Iterable[bytes | memoryview]]) -> None:
    """Writes a whole folder as one act: file name -> its bytes in chunks, then a manifest with sizes and SHA-256 sums.

    A folder already at `path` is there until the new one is complete, and then replaced.
    """
    with _staged(path) as temporary:
        files: dict[str, dict[str, Any]] = {}
        for name, chunks in contents.items():
            size, digest = _write_file(temporary / name, chunks)
            files[name] = {"size": size, "sha256": digest}
        _write_file(temporary / MANIFEST, [_manifest(files)])
        _sync_folder(temporary)


def folder_damage(path: Path) -> str | None:
    """Why a folder made by `write_folder` is not what was written, in words; None when every byte is.

    Files that the manifest does not name are not looked at.
    """
    try:
        data = (path / MANIFEST).read_bytes()
        manifest = json.loads(data)
        schema, files = manifest["schema"], manifest["files"]
        if schema != MANIFEST_SCHEMA:
            return f"{MANIFEST} has schema {schema}, and this version reads {MANIFEST_SCHEMA}"
        if data != _manifest(files):
            return f"{MANIFEST} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for name, entry in files.items():
        try:
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return f"{name} does not have the checksum it was written with"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def remove_folder(path: Path) -> None:
    """Removes a folder or file: from one instant to the next it is not under its name any more, then it is deleted."""
    trash = path.parent / f"{_TRASH}{path.name}"
    with explained(path):
        _delete(trash)
        os.replace(path, trash)
        _sync_folder(path.parent)
        _delete(trash)


def clean_leftovers(folder: Path) -> None:
    """Deletes what a kill left behind in `folder`, and puts back what it caught between the two renames of a swap.

    Only for the one process that may write there.
    """
    with explained(folder):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            place = folder / path.name.removeprefix(_OLD)
            if path.name.startswith(_OLD) and not os.path.lexists(place):
                os.replace(path, place)
                _sync_folder(folder)
            elif path.name.startswith(LEFTOVERS):
                _delete(path)


class FolderLock:
    """The right to write in a folder, held by one process at a time.

    The operating system holds it, in the file `.lock`, and lets go when the process ends, however it ends; the file
    stays. It says which process to name to the others.
    """

    def __init__(self, folder: Path) -> None:
        """Takes the lock, or raises RunError naming the folder and the process that has it."""
        self.folder = folder
        with explained(folder / LOCK):
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
            try:
                if not _try_lock(descriptor):
                    raise RunError(
                        f"Only one process may write in {folder} at a time. {_holder(folder / LOCK)} is writing there. "
                        "Try again when it has ended, or another folder for the output."
                    )
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            except BaseException:
                os.close(descriptor)
                raise
        self._descriptor: int | None = descriptor

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def release(self) -> None:
        """Lets others write. A second call does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


if sys.platform == "win32":

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte beyond the text, which must stay readable
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        return f"Process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, and has not written its name yet
        return "Another process"


def _temporary(path: Path) -> Path:
    return path.parent / f"{_TEMPORARY}{os.getpid()}-{path.name[:40]}"


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    temporary = _temporary(path)
    with explained(path):
        try:
            _delete(temporary)
            os.mkdir(temporary)
            yield temporary
            _put_in_place(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                _delete(temporary)
            raise


def _put_in_place(temporary: Path, path: Path) -> None:
    """Renames a complete folder. POSIX cannot swap two folders, so an old one steps aside, and back if this fails."""
    old = path.parent / f"{_OLD}{path.name}"
    replaces = os.path.lexists(path)
    if replaces:
        _delete(old)
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        if replaces:
            os.replace(old, path)
        raise
    _sync_folder(path.parent)
    if replaces:
        remove_folder(old)


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes and flushes a file from chunks (views: flat, of bytes); returns its size in bytes and its SHA-256."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                digest.update(piece)
                _write_all(descriptor, piece)
            size += len(view)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:  # a write may take fewer bytes than it was given
        view = view[os.write(descriptor, view) :]


def _sync(path: Path) -> None:
    descriptor = os.open(path, _TO_SYNC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Flushes names (a rename, a new file). Windows has no such call, and some network file systems refuse it."""
    if sys.platform == "win32":
        return
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _delete(path: Path) -> None:
    """Deletes a file or a folder with all in it; nothing there is fine. Links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            _delete(inner)
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _manifest(files: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest of these files; its own checksum and layout catch a change anywhere in it."""
    body: dict[str, Any] = {"schema": MANIFEST_SCHEMA, "files": files}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": own}, indent=2, sort_keys=True) + "\n").encode()


def _json(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode(errors="backslashreplace")  # half a surrogate pair becomes its JSON escape


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
