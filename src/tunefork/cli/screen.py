"""Where results go: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from tunefork.data.values import visible

Json = Annotated[bool, typer.Option("--json", help="machine-readable results alone on stdout")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a file that is there")]


def screen(machine: bool) -> Console:
    """Where people read: stdout, or stderr when stdout is for a machine."""
    return Console(stderr=machine, highlight=False, emoji=False)


def escape(text: str) -> str:
    """Text from elsewhere (rows, labels, paths, models) as it may be printed: no markup, no commands to a terminal."""
    return escape_markup(visible(text))


def emit(value: Any, indent: int | None = 2) -> None:
    """JSON, alone on stdout; numbers that are not finite are null, as in result.json. `indent` None: on one line."""
    finite = json.loads(json.dumps(value, default=_plain), parse_constant=lambda name: None)
    json.dump(finite, sys.stdout, indent=indent)
    sys.stdout.write("\n")
    sys.stdout.flush()


def empty_table(*left: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table with these columns, those of `right` (figures) at the right edge."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
