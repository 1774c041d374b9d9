"""`tunefork hosted`, and what the other commands share where something is paid for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tunefork.cli.options import recipe_command
from tunefork.cli.screen import Json, Overwrite, emit, escape, screen
from tunefork.errors import RecipeError
from tunefork.recipe import Recipe

if TYPE_CHECKING:
    from tunefork.hosted.prices import Estimate
    from tunefork.workflows import HostedPlan

hosted_app = typer.Typer(help="Jobs at a service.", no_args_is_help=True)
PLAIN_EVERY_SECONDS = 5.0
Yes = Annotated[bool, typer.Option("--yes", help="do not ask before something is paid for")]


def confirmer(console: Console, yes: bool, limit: float | None) -> Callable[[Estimate], bool]:
    """Shows an estimate, and asks whether to go on unless --yes or a limit has said so."""

    def confirm(estimate: Estimate) -> bool:
        console.print(escape(estimate.says()), soft_wrap=True)
        if yes or limit is not None:
            return True
        if not sys.stdin.isatty():
            raise RecipeError(
                "What is paid for must be confirmed. Received no terminal to ask on. Try --yes, or a limit in dollars."
            )
        return typer.confirm("Go on?", err=console.stderr)

    return confirm


def progress(console: Console) -> Callable[[int, int], None]:
    """A line every few seconds, and the last one."""
    told = [0.0]

    def on_answer(done: int, total: int) -> None:
        if time.monotonic() - told[0] > PLAIN_EVERY_SECONDS or done == total:
            told[0] = time.monotonic()
            console.print(f"{done:,} of {total:,} answers")

    return on_answer


def show_hosted(console: Console, plan: HostedPlan, as_json: bool) -> None:
    """What would be sent and what it may cost. Exits with 2 where the rows are refused."""
    from tunefork.cli.progress import Watcher

    Watcher(console).hosted(plan)
    console.print(escape(plan.estimate.says()), soft_wrap=True)
    if as_json:
        found = [asdict(f) for f in plan.findings]
        emit({"counts": plan.counts(), "findings": found, "estimate": asdict(plan.estimate)})
    if any(f.level == "error" for f in plan.findings):
        raise typer.Exit(2)


@recipe_command
def data_export(
    recipe: Recipe,
    *,
    to: Annotated[str, typer.Option("--to", help="openai, together, fireworks, mistral or nebius")] = "openai",
    folder: Annotated[Path, typer.Option("--folder", help="for train.jsonl and valid.jsonl")] = Path("exported"),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the rows as a service's training files, checked by its published rules."""
    from tunefork import workflows
    from tunefork.cli.show import show_findings

    console = screen(as_json)
    paths, findings = workflows.export_lines(recipe, to, folder, overwrite)
    show_findings(console, [f for f in findings if f.level != "info"])
    console.print(f"[bold]{escape(' · '.join(map(str, paths.values())))}[/]", soft_wrap=True)
    if as_json:
        emit({"paths": {name: str(path) for name, path in paths.items()}, "findings": [asdict(f) for f in findings]})


@hosted_app.command("cancel")
def cancel(run: Annotated[Path, typer.Argument(help="the folder of a hosted run")]) -> None:
    """Cancel the job of a run."""
    from tunefork import workflows

    screen(False).print(f"The job of {escape(str(run))}: {workflows.cancel_hosted(run)}", soft_wrap=True)


@hosted_app.command("deployed")
def deployed(
    run: Annotated[Path, typer.Argument(help="the folder of a hosted run")],
    name: Annotated[str, typer.Argument(help="what the service calls the deployment")],
) -> None:
    """Say under which name the tuned model of a run answers, where a service wants it deployed first."""
    from tunefork import workflows

    workflows.name_deployment(run, name)
    screen(False).print(f"Go on with `tunefork train {escape(str(run))} --resume`.", soft_wrap=True)
