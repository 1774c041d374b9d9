"""Where a bad input is made: an empty folder, tiny models, a finished run, and the command that would have worked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cli.scenes import chats, put, reviews

Arguments = list[object]


@dataclass
class Place:
    """An empty folder to be clumsy in; it is the working folder too."""

    folder: Path
    tiny: Callable[[str], Path]
    kept: Path  # a finished run with checkpoints; copied before it is touched
    patch: pytest.MonkeyPatch

    def put(self, name: str, content: str | bytes | Sequence[Mapping[str, Any]]) -> Path:
        return put(self.folder / name, content)

    def rows(self, name: str = "rows.csv") -> Path:
        return self.put(name, reviews())

    def train(self, *more: object) -> Arguments:
        """A small training that works; what comes later wins."""
        start: Arguments = ["train", "--json", "--task", "classification", "--train", self.rows()]
        start += ["--model", self.tiny("llama"), "--out", self.folder / "out", "--max-steps", 2]
        return [*start, "--set", "evaluate.baselines=[]", *more]

    def train_on(self, name: str, content: str | bytes | Sequence[Mapping[str, Any]], *more: object) -> Arguments:
        return self.train("--train", self.put(name, content), *more)

    def train_with(self, recipe: str | bytes, name: str = "recipe.yaml", *more: object) -> Arguments:
        return ["train", self.put(name, recipe), "--json", "--out", self.folder / "out", *more]

    def chat(self, rows: Sequence[Mapping[str, Any]], *more: object) -> Arguments:
        return self.train_on("chats.jsonl", rows, "--task", "chat", *more)

    def good_chat(self, *more: object) -> Arguments:
        return self.chat(chats(), *more)

    def model(self, kind: str = "llama", name: str = "model") -> Path:
        """A copy of a tiny model, to be damaged."""
        return shutil.copytree(self.tiny(kind), self.folder / name)

    def run(self, *, finished: bool = True) -> Path:
        """A copy of the run; unfinished it has checkpoints of steps 1 and 2, and no model."""
        run = shutil.copytree(self.kept, self.folder / "kept")
        if not finished:
            (run / "result.json").unlink()
            shutil.rmtree(run / "model")
        return run

    def resume(self, *more: object, finished: bool = False) -> Arguments:
        return ["train", "--json", "--resume", "--out", self.run(finished=finished), *more]


class Case(NamedTuple):
    """One bad input: how it is made, and what the message must say."""

    name: str
    arguments: Callable[[Place], Arguments]
    says: tuple[str, ...]
    code: int = 2
    writes: bool = False  # fails after it has begun: what is left is looked at in a test of its own


def tree(folder: Path) -> dict[str, bytes | None]:
    """Relative path -> content of everything below a folder (None for folders), locks left out."""
    found = (path for path in sorted(folder.rglob("*")) if path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in found}
