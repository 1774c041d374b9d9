"""Content on disk: a folder a file, with its bytes, their checksum, and the row that the store has of it.

`--recover` reads the rows back from here, so a folder is written before its row and removed after it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import inspect

from tunefork.errors import RunError
from tunefork.files import explained, make_folder, remove_folder, write_folder
from tunefork.server.store import Row

CONTENT, ROW = "content", "row.json"
_PIECE = 2**20


def row_values(row: Row) -> dict[str, Any]:
    """A row's columns as JSON; `seq` is left out."""
    names = [column.key for column in inspect(type(row)).column_attrs]
    return {name: getattr(row, name) for name in names if name != "seq"}


def write_blob(folder: Path, chunks: Iterable[bytes], row: Row) -> None:
    """Writes a blob durably, whole or not at all. Raises TrainingError when the disk is full."""
    make_folder(folder.parent)
    write_folder(folder, {CONTENT: chunks, ROW: [json.dumps(row_values(row)).encode()]})


def remove_blob(folder: Path) -> None:
    if folder.is_dir():
        remove_folder(folder)


def chunks_of(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


def chunks_at(paths: Iterable[Path]) -> Iterator[bytes]:
    """The content of several blobs, one after the other."""
    for path in paths:
        with (path / CONTENT).open("rb") as file:
            yield from chunks_of(file)


def link_content(folder: Path, target: Path) -> None:
    """Gives a blob's content a second name, so that deleting the blob leaves it; a copy where links cannot be."""
    if target.exists():
        return
    make_folder(target.parent)
    with explained(target):
        try:
            os.link(folder / CONTENT, target)
        except FileNotFoundError:
            raise RunError(f"The file {folder.name} must have its content. Received {folder} without it.") from None
        except OSError:
            shutil.copyfile(folder / CONTENT, target)
