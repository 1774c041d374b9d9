"""Everything Tunefork raises on purpose: one small tree, each leaf also a standard-library error.

A message follows one pattern: what must hold, what was received, what to try.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TuneforkError(Exception):
    """Root of the tree. `exit_code` is what the command line returns for it."""

    exit_code: int = 1


class RecipeError(TuneforkError, ValueError):
    """A recipe that cannot be meant: unknown key, value out of range, a combination that is not supported."""

    exit_code = 2


class DataError(TuneforkError, ValueError):
    """Rows that cannot be read or used. The message names file, row and column."""

    exit_code = 2


class UnsupportedError(TuneforkError, ValueError):
    """A combination of model, task, adapter or device that is refused by name."""

    exit_code = 2


class MissingFileError(TuneforkError, FileNotFoundError):
    """A file or folder that was named and is not there."""

    exit_code = 2

    def __str__(self) -> str:  # FileNotFoundError would print only errno fields
        return str(self.args[0]) if self.args else ""


class MissingExtraError(TuneforkError, ImportError):
    """A package of an optional extra is not installed."""

    exit_code = 2

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the package `{package}`. Try: pip install 'tunefork[{extra}]'.")


class RunError(TuneforkError, RuntimeError):
    """A run folder that cannot be used: locked, already finished, not a run, no good checkpoint."""

    exit_code = 2


class TrainingError(TuneforkError, RuntimeError):
    """Training cannot go on: the loss is not finite, the disk is full, memory ran out."""


class HostedError(TuneforkError, RuntimeError):
    """A hosted service refused, could not be reached, or would have cost too much. What it answered before is kept."""

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class ExportError(TuneforkError, RuntimeError):
    """An artefact that could not be proven equal to what was trained."""


class Interrupted(TuneforkError):  # noqa: N818 - not an error of anybody
    """Ctrl-C or SIGTERM: the last finished step is saved; `--resume` goes on from it."""

    exit_code = 130


def did_you_mean(word: str, options: Iterable[str], before: str = "") -> str:
    """` Did you mean `x`?` for the nearest option, with `before` before it; an empty string when none is near."""
    names = [str(option) for option in options]
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" Did you mean `{before}{near[0]}`?" if near else ""
