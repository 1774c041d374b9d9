"""`tunefork data`: rows before training, and rows for others."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from tunefork.cli.hosted import data_export
from tunefork.cli.options import recipe_command
from tunefork.cli.screen import Json, emit, screen
from tunefork.recipe import Recipe

data_app = typer.Typer(help="Look at rows before training on them.", no_args_is_help=True)
data_app.command("export")(data_export)


@data_app.command("check")
@recipe_command
def data_check(recipe: Recipe, *, as_json: Json = False) -> None:
    """Everything that is found in the rows before training, alone."""
    from tunefork import words, workflows
    from tunefork.cli.show import show_findings

    found = workflows.check_data(recipe)
    console = screen(as_json)
    for name, count in found.counts.items():
        console.print(f"{name}: {words.count(count['rows'], 'row')}, {words.count(count['tokens'], 'token')}")
    show_findings(console, found.findings)
    if as_json:
        emit({"counts": found.counts, "findings": [asdict(f) for f in found.findings]})
    if found.refused:
        raise typer.Exit(2)


@data_app.command("show")
@recipe_command
def data_show(
    recipe: Recipe,
    *,
    row: Annotated[int, typer.Option("--row", min=0, metavar="N", help="which row, from 0")] = 0,
    split: Annotated[str, typer.Option("--split", help="train, dev or test")] = "train",
    as_json: Json = False,
) -> None:
    """A row as the model sees it: every token, masked or trained."""
    from tunefork import workflows
    from tunefork.cli.show import show_tokens

    shown = workflows.show_data(recipe, row=row, split=split)
    if as_json:
        emit([asdict(one) for one in shown])
        return
    console = screen(False)
    for one in shown:
        show_tokens(console, one)
