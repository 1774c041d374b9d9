"""What the data room hands on: rows that know where they came from, and findings about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunefork.recipe.schema import Layout


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: its values by column (or canonical field) name, and where it stood."""

    values: Mapping[str, Any]
    file: str
    line: int  # 1-based line in a text file, row in a table
    part: int | None = None  # which question of the row, from 1, where one row holds several
    unreadable: str = ""  # why it has no values

    @property
    def source(self) -> str:
        return f"{self.file}:{self.line}" + ("" if self.part is None else f"#{self.part}")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the check found. An error refuses the run, a warning is shown and counted."""

    level: Literal["error", "warning", "info"]
    code: str  # stable, kebab-case: "unknown-label"
    message: str  # one sentence: what was found
    count: int = 1
    examples: tuple[str, ...] = ()  # the first few, "file:line: what"
    advice: str = ""  # what to do about it
    split: str = ""  # train, dev, test or ""


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows by use, in one layout. `test` is read once, at the end; `origin` says in words how each came about."""

    train: Sequence[Row]
    dev: Sequence[Row]
    test: Sequence[Row]
    layout: Layout
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Item:
    """A row as the check sees it: what a model reads, and the answer as one word where there is one."""

    source: str  # "train.csv:12"
    text: str
    label: str | None = None
    group: str = ""
