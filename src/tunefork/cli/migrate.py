"""`tunefork migrate`: record what a hosted model says while it still answers, and move away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tunefork.cli.hosted import Yes, confirmer, progress
from tunefork.cli.options import Origin
from tunefork.cli.screen import Json, emit, empty_table, escape, screen
from tunefork.files import write_atomic
from tunefork.recipe import Recipe, load_recipe, parse_sets

migrate_app = typer.Typer(help="The way out of a service: inventory, record, retrain, compare.", no_args_is_help=True)

Limit = Annotated[
    float | None, typer.Option("--limit", min=0, metavar="DOLLARS", help="never spend more; not asked then")
]
Prices = Annotated[Path | None, typer.Option("--prices", help="a price table of your own, YAML")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="any key of the recipe it reads")]
METHODS = ("backprop/lora", "backprop/none", "zo/lora")


@migrate_app.command("record")
def record(
    model: Annotated[str, typer.Option("--model", help="openai:ft:…, azure:…, nebius:… or URL#MODEL")],
    out: Annotated[Path, typer.Option("--out", help="the recording's folder; given again, it goes on")],
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="rows to ask; default: the validation file of the model's job")
    ] = None,
    text_field: Annotated[str | None, typer.Option("--text-field", help="column that is asked")] = None,
    label_field: Annotated[str | None, typer.Option("--label-field", help="column with the right answer")] = None,
    top_logprobs: Annotated[int, typer.Option("--top-logprobs", min=-1, max=20, help="-1: no logprobs")] = 5,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="longest answer")] = 1024,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, max=256, help="requests at a time, 8 by default")
    ] = None,
    limit: Limit = None,
    prices: Prices = None,
    sets: Sets = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Keep what a tuned model says, with log-probabilities. Resumable; no answer is paid for twice."""
    from tunefork import migrate
    from tunefork.hosted.client import Client
    from tunefork.hosted.services import find_model

    console = screen(as_json)
    flags = {"hosted.concurrency": concurrency, "hosted.limit": limit, "hosted.prices": prices and str(prices)}
    asked = _recipe(sets, ("hosted.system", "hosted.request", *flags), flags).hosted
    client = Client(find_model(model).service, on_wait=lambda text: console.print(f"[dim]{escape(text)}[/]"))
    found = migrate.record(
        model,
        out,
        prompts,
        confirm=confirmer(console, yes, asked.limit),
        text_field=text_field,
        label_field=label_field,
        top_logprobs=None if top_logprobs < 0 else top_logprobs,
        max_tokens=max_tokens,
        concurrency=asked.concurrency,
        limit=asked.limit,
        prices=asked.prices,
        system=asked.system,
        request=asked.request,
        client=client,
        on_answer=progress(console),
    )
    for finding in found.findings:
        if finding.level != "info":
            console.print(f"[yellow]{finding.level}[/] {escape(finding.message)}", soft_wrap=True)
    for row in [r for r in found.rows if r.error is not None][:3]:
        console.print(f"[yellow]refused[/] {escape(f'{row.source}: {row.error}')}", soft_wrap=True)
    console.print(_summary(found.about))
    console.print(
        f"[bold]{escape(str(found.path))}[/]  recorded.jsonl · answers.jsonl · recording.json", soft_wrap=True
    )
    if as_json:
        emit({"path": str(found.path), **found.about})


@migrate_app.command("inventory")
def inventory(
    service: Annotated[str, typer.Option("--service", help="openai, azure, nebius, or a URL")] = "openai",
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write")] = None,
    as_json: Json = False,
) -> None:
    """Tuned models, what they were made of, and until when they answer."""
    from tunefork.migrate.inventory import dates
    from tunefork.migrate.inventory import inventory as take

    console, found = screen(as_json), take(service, out)
    for m in found:  # names are copied from here: a table would cut them
        console.print(f"[bold]{escape(m.model)}[/]", soft_wrap=True)
        until = f"answers until {m.shutdown}" if m.shutdown else "answers, no end is known"
        files = [f"{what} {id}" for what, id in (("train", m.training_file), ("valid", m.validation_file)) if id]
        told = (f"on {m.base}", until if m.answers else "is not listed any more", m.job or "no job is seen", *files)
        console.print(f"  {escape(' · '.join(told))}", soft_wrap=True)
    how = "Record each with `tunefork migrate record --model MODEL --out FOLDER`."
    console.print(f"Dates as of {dates()['date']}. {how}" if found else "No tuned model is seen.", soft_wrap=True)
    if as_json:
        emit([asdict(model) for model in found])


@migrate_app.command("retrain")
def retrain(
    recording: Annotated[Path, typer.Argument(help="a recording's folder")],
    model: Annotated[str, typer.Option("--model", help="local base: a folder or hub name with a chat template")],
    out: Annotated[Path, typer.Option("--out", help="folder of the runs")],
    train: Annotated[Path | None, typer.Option("--train", help="default: the training file of the model's job")] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="METHOD/ADAPTER, comma-separated, each tried if it fits")
    ] = ("backprop/lora,backprop/none,zo/lora"),
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Train a local base on the same files, by each method that fits here; the best on dev is chosen."""
    from tunefork.cli.progress import Watcher
    from tunefork.migrate.retrain import retrain as train_again

    console = screen(as_json)
    names = [name.strip() for name in methods.split(",")]
    found = train_again(
        recording, model, out, train=train, methods=names, sets=parse_sets(sets or []), listener=Watcher(console)
    )
    table = empty_table("method", "", right=("loss on dev",))
    for cell in found["tried"]:
        loss = "–" if cell["dev_loss"] is None else f"{cell['dev_loss']:.4f}"
        table.add_row(cell["name"], escape(cell["skipped"] or cell["path"]), loss)
    console.print(table)
    console.print(f"[bold]{escape(found['chosen'])}[/]", soft_wrap=True)
    if as_json:
        emit(found)


@migrate_app.command("compare")
def compare(
    recording: Annotated[Path, typer.Argument(help="a recording's folder")],
    model: Annotated[str, typer.Option("--model", help="a run, a local chat model, or a hosted one")],
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps")] = None,
    limit: Limit = None,
    prices: Prices = None,
    sets: Sets = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Ask another model the recorded prompts; agreement, scores, and the answers that changed most."""
    from tunefork.migrate.compare import compare as beside
    from tunefork.report import migration_verdict

    console = screen(as_json)
    flags = {"model.device": device, "hosted.limit": limit, "hosted.prices": prices and str(prices)}
    recipe = _recipe(sets, ("hosted.", "model."), flags)
    agree = confirmer(console, yes, recipe.hosted.limit)
    found = beside(recording, model, recipe=recipe, confirm=agree, on_answer=progress(console))
    console.print(migration_verdict(found), soft_wrap=True)
    _write_page([recording], recording / "migration.html", console)
    if as_json:
        emit(found)


@migrate_app.command("report")
def report(
    recordings: Annotated[list[Path], typer.Argument(help="recordings that were compared")],
    out: Annotated[Path, typer.Option("--out", help="the page to write")] = Path("migration.html"),
) -> None:
    """All of a migration on one page."""
    _write_page(recordings, out, screen(False))


def _recipe(sets: list[str] | None, read: tuple[str, ...], flags: Mapping[str, Any]) -> Recipe:
    """The recipe that --set and the flags make; RecipeError for a key that the command does not read."""
    given = parse_sets(sets or []) | {path: value for path, value in flags.items() if value is not None}
    Origin(None, tuple(given)).only(*read)
    return load_recipe(None, {"task": "chat"} | given)


def _write_page(recordings: list[Path], out: Path, console: Console) -> None:
    from tunefork.migrate.compare import read_comparison
    from tunefork.report import render_migration

    write_atomic(out, render_migration([read_comparison(path) for path in recordings]))
    console.print(f"[bold]{escape(str(out))}[/]", soft_wrap=True)


def _summary(about: Any) -> str:
    parts = [f"{about['answers']:,} answers"]
    for name, what in (("refused", "refused by the service"), ("cut_short", "cut short (--max-tokens)")):
        if about[name]:
            parts.append(f"{about[name]:,} {what}")
    if about["unanswered"]:
        parts.append(f"{about['unanswered']:,} requests were cut off and sent again")
    if about["cost"] is not None:
        parts.append(f"${about['cost']:,.4f} in all")
    return "; ".join(parts)
