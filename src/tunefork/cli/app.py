"""The commands: parse, call, render. What they do lives in `tunefork.workflows`.

Rooms that need PyTorch are imported where they are used, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tunefork import __version__
from tunefork.cli.data import data_app
from tunefork.cli.hosted import Yes, confirmer, hosted_app, progress, show_hosted
from tunefork.cli.migrate import migrate_app
from tunefork.cli.options import Origin, parse_size, recipe_command
from tunefork.cli.screen import Json, Overwrite, emit, empty_table, escape, screen
from tunefork.cli.server import keys_app, serve
from tunefork.data.values import visible
from tunefork.errors import DataError
from tunefork.hosted import is_hosted
from tunefork.recipe import Recipe

app = typer.Typer(
    help="Fine-tune language models on the machine you have, and believe the numbers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(keys_app, name="keys")
app.add_typer(migrate_app, name="migrate")
app.add_typer(hosted_app, name="hosted")
app.command()(serve)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")]
Trusted = Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that the base model brings")]


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"tunefork {__version__}\n")
        raise typer.Exit


@app.callback()
def _tunefork(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command()
@recipe_command
def train(
    recipe: Recipe,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest good checkpoint in --out")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="stop before the first step; write nothing")] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, metavar="N", help="run N seeds; report mean and spread")] = 1,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on rows, measure it against baselines, keep and report it."""
    from tunefork import workflows
    from tunefork.cli.progress import Watcher
    from tunefork.cli.show import show_plan, show_result, show_spread
    from tunefork.train.prepare import refuse_errors

    console = screen(as_json)
    if dry_run and is_hosted(recipe.model.name):
        show_hosted(console, workflows.plan_hosted(recipe), as_json)
        return
    if dry_run:
        first = recipe if seeds == 1 else workflows.seed_recipes(recipe, seeds)[0]
        plan = workflows.plan_run(first, resume=resume)
        show_plan(console, plan)
        if as_json:
            job = plan.job
            emit(
                {
                    "recipe": job.recipe.model_dump(mode="json"),
                    "reasons": [asdict(r) for r in job.resolved.reasons],
                    "data": {"counts": job.counts(), "findings": [asdict(f) for f in job.findings]},
                    "steps": job.resolved.steps,
                    "forecast": asdict(plan.forecast),
                }
            )
        refuse_errors(plan.job.findings)
        return
    watcher = Watcher(console, confirmer(console, yes, recipe.hosted.limit))
    if seeds > 1:
        found = workflows.finetune_seeds(recipe, seeds, resume=resume, listener=watcher)
        if as_json:
            runs = [dict(run.result) for run in found.runs]
            emit({"path": str(found.path), "spread": found.spread, "baselines": found.baselines, "runs": runs})
        show_spread(console, found)
        return
    done = workflows.finetune(recipe, resume=resume, listener=watcher)
    show_result(console, done.result, str(done.path))
    if as_json:
        emit({"path": str(done.path), **done.result})


@app.command()
@recipe_command
def evaluate(
    recipe: Recipe,
    *,
    origin: Origin,
    shots: Annotated[int, typer.Option("--shots", min=0, max=64, metavar="N", help="rows of --train shown first")] = 0,
    trust: Trusted = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Measure a run (give its folder), or any --model as it is, on the rows of --test."""
    from tunefork import workflows
    from tunefork.cli.show import show_findings, show_metrics
    from tunefork.words import count, duration

    console = screen(as_json)
    model = recipe.model.name
    file = origin.file
    measured = ("evaluate.bootstrap", "evaluate.confidence", "evaluate.tokens_per_batch", "seed")
    if file is not None and file.is_dir():
        origin.only("data.test", "data.max_unusable", "data.max_cut", "model.device", *measured)
        model = str(file)
    else:
        origin.only("model.", "task.", "data.", "hosted.", *measured)
    agree = confirmer(console, yes, recipe.hosted.limit)
    found = workflows.evaluate(
        model, recipe=recipe, shots=shots, trust_remote_code=trust, confirm=agree, on_answer=progress(console)
    )
    show_findings(console, [f for f in found.findings if f.level != "info"])
    show_metrics(console, {model: found.metrics})
    for note in found.notes:
        console.print(escape(note), soft_wrap=True)
    console.print(f"{count(len(found.predictions), 'row')} in {duration(found.seconds)}")
    if as_json:
        findings = [asdict(f) for f in found.findings]
        figures = {"test": found.metrics, "rows": len(found.predictions), "seconds": found.seconds}
        emit({"model": model, **figures, "findings": findings, "notes": found.notes})


@app.command()
@recipe_command
def compare(
    recipe: Recipe,
    *,
    methods: Annotated[
        str | None, typer.Option("--methods", help="comma-separated adapters or method/adapter: lora,none,head")
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option("--memory-limit", metavar="SIZE", help="advise only what takes less: 800M, 6G")
    ] = None,
    as_json: Json = False,
) -> None:
    """Methods and baselines on one task in one table, each in a process of its own."""
    from tunefork import workflows
    from tunefork.cli.show import cell_line, comparison_table

    console = screen(as_json)
    names = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    limit = parse_size(memory_limit) if memory_limit is not None else None
    on_cell = lambda name, cell: console.print(cell_line(name, cell), soft_wrap=True)  # noqa: E731
    found = workflows.compare(recipe, names, memory_limit=limit, on_cell=on_cell)
    console.print(comparison_table(found))
    if found.advice is not None:
        console.print(escape(found.advice.sentence), soft_wrap=True)
    console.print(f"[bold]{escape(str(found.path))}[/]  comparison.json · cells/", soft_wrap=True)
    if as_json:
        emit({"path": str(found.path), **found.as_dict()})
    if any(cell.error is not None for cell in found.cells):
        raise typer.Exit(1)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run")],
    file: Annotated[Path, typer.Argument(help="rows; labels are not needed")],
    out: Annotated[Path | None, typer.Option("--out", help="default: NAME.predicted.EXT beside the file")] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    trust: Trusted = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Add prediction and probability columns to a file."""
    from tunefork import workflows
    from tunefork.cli.show import show_findings

    console = screen(as_json)
    agree = confirmer(console, yes, None)
    found = workflows.predict(
        run, file, out, device=device, overwrite=overwrite, trust_remote_code=trust, confirm=agree
    )
    show_findings(console, [f for f in found.findings if f.level != "info" or f.code == "hosted"])
    console.print(f"{found.predicted:,} of {found.rows:,} rows predicted: [bold]{escape(str(found.path))}[/]")
    if as_json:
        counts = {"rows": found.rows, "predicted": found.predicted}
        findings = [asdict(f) for f in found.findings]
        emit({"path": str(found.path), **counts, "columns": found.columns, "findings": findings})


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="a run, a model folder, a hub name, or openai:…")] = "embedded",
    system: Annotated[str | None, typer.Option("--system", help="system message")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=5.0, metavar="NUMBER", help="0 to 5; 0 is greedy")
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="longest reply")] = 256,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="of sampling")] = 0,
    device: Device = "auto",
    trust: Trusted = False,
    as_json: Json = False,
) -> None:
    """Talk with a model in the terminal; an empty line or Ctrl-D ends it. With --json each reply is a line of JSON."""
    from tunefork import workflows

    talk = workflows.Chat(
        model,
        system=system,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
        trust_remote_code=trust,
    )
    interactive = sys.stdin.isatty() and not as_json
    while True:
        if interactive:
            sys.stdout.write("you> ")
            sys.stdout.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise DataError(f"What is said must be UTF-8 text. Received: {error}. Try `iconv -t UTF-8`.") from None
        if not line.strip():
            return
        if interactive:
            sys.stdout.write("model> ")
        pieces = talk.say(line.strip())
        if as_json:
            emit({"reply": "".join(pieces), "left_out": talk.left_out}, indent=None)
            continue
        for piece in pieces:
            sys.stdout.write(visible(piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
        if talk.left_out:
            sys.stderr.write(f"({talk.left_out} tokens of the conversation no longer fit and were left out)\n")


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option("--to", help="merged, adapter, or trajectory")] = "merged",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="default: RUN/export-TO")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, fp32, bf16 or fp16 of the merged weights")] = "auto",
    device: Device = "auto",
    trust: Trusted = False,
    as_json: Json = False,
) -> None:
    """Keep the model in a form other tools load; a merge is proven equal to what was trained."""
    from tunefork.export.exporting import export as export_run

    console = screen(as_json)
    found = export_run(run, to=to, out=out, dtype=dtype, device=device, trust_remote_code=trust)
    console.print(escape(found.says), soft_wrap=True)
    console.print(f"[bold]{escape(str(found.path))}[/]", soft_wrap=True)
    if as_json:
        emit({"path": str(found.path), "proof": found.proof})


@app.command()
def replay(
    base: Annotated[str, typer.Argument(help="folder or hub name of the model that was trained")],
    trajectory: Annotated[Path, typer.Argument(help="a trajectory, or the folder of a run or export that holds one")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the rebuilt model's folder")],
    step: Annotated[
        int | None, typer.Option("--step", min=0, metavar="N", help="after this many steps; default: as it was kept")
    ] = None,
    device: Device = "auto",
    trust: Trusted = False,
    as_json: Json = False,
) -> None:
    """Rebuild what the method zo trained, bit for bit, from the base model and the log of the run."""
    from tunefork import workflows
    from tunefork.words import duration

    console = screen(as_json)
    on_stage = lambda text: console.print(f"[dim]{escape(text)} …[/]")  # noqa: E731
    found = workflows.replay(
        base, trajectory, out, step=step, device=device, trust_remote_code=trust, on_stage=on_stage
    )
    near = f", from the checkpoint of step {found.from_step:,}" if found.from_step else ""
    console.print(f"step {found.step:,} of {found.steps:,} rebuilt in {duration(found.seconds)}{near}")
    if found.torn_bytes:
        console.print(f"left out: {found.torn_bytes:,} bytes of a step whose record was never finished")
    console.print(f"[bold]{escape(str(found.path))}[/]", soft_wrap=True)
    if as_json:
        emit(asdict(found))


@app.command()
def report(run: Run, as_json: Json = False) -> None:
    """Write RUN/report.html again."""
    from tunefork.report import write_report

    path = str(write_report(run))
    screen(as_json).print(escape(path), soft_wrap=True)
    if as_json:
        emit({"path": path})


@app.command()
def methods(as_json: Json = False) -> None:
    """The ways weights can be changed."""
    from tunefork.methods import list_methods

    if as_json:
        emit([asdict(info) for info in list_methods()])
        return
    table = empty_table("method", "what it does", "adapters", "memory")
    for info in list_methods():
        table.add_row(info.name, f"{info.summary} ({info.paper})", ", ".join(info.adapters), info.memory)
    screen(False).print(table)


@app.command()
def tasks(as_json: Json = False) -> None:
    """The kinds of task, and the presets with their wording and metric."""
    from tunefork.tasks import list_tasks

    if as_json:
        emit([asdict(info) for info in list_tasks()])
        return
    table = empty_table("task", "kind", "metric", "what it asks, and from where")
    table.columns[0].no_wrap = True  # a name to be typed
    for info in list_tasks():
        asks = f"{escape(info.summary)}\n[dim]{escape(info.source)}[/]" if info.source else escape(info.summary)
        table.add_row(info.name, info.kind, info.metric, asks)
    screen(False).print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="the run's folder")] = Path("runs/demo"),
    rows: Annotated[
        Path | None, typer.Option("--rows", metavar="FILE", help="only write the embedded rows, as csv, jsonl …")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The main job on the embedded model and data: a few minutes on two CPU cores, no network."""
    from tunefork import workflows
    from tunefork.cli.progress import Watcher
    from tunefork.cli.show import show_result

    console = screen(as_json)
    if rows is not None:
        count = workflows.demo_rows(rows, overwrite=overwrite)
        console.print(f"{count:,} rows of customer feedback: [bold]{escape(str(rows))}[/]", soft_wrap=True)
        if as_json:
            emit({"path": str(rows), "rows": count})
        return
    done = workflows.demo(out, listener=Watcher(console))
    show_result(console, done.result, str(done.path))
    if as_json:
        emit({"path": str(done.path), **done.result})


@app.command()
def doctor(as_json: Json = False) -> None:
    """Is this machine ready? Versions, devices, memory, extras, and two steps of training for real."""
    from tunefork import workflows

    checks = workflows.doctor()
    if as_json:
        emit([asdict(check) for check in checks])
    else:
        console = screen(False)
        for check in checks:
            mark = {True: "[green]ok[/]  ", False: "[red]no[/]  ", None: "[dim]-[/]   "}[check.ok]
            console.print(f"{mark}{check.name:16} {escape(check.says)}", soft_wrap=True)
    if any(check.ok is False for check in checks):
        raise typer.Exit(1)
