"""What a person reads: plans, findings, results, tables. Numbers come from elsewhere; here they are only set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tunefork import words
from tunefork.cli.screen import empty_table, escape
from tunefork.data import Finding
from tunefork.evaluate.summary import caution
from tunefork.recipe.load import settings
from tunefork.report import verdict
from tunefork.run import RunFolder
from tunefork.words import duration, size
from tunefork.workflows.advice import Cell
from tunefork.workflows.compare import Comparison
from tunefork.workflows.finetune import Plan
from tunefork.workflows.inspect import ShownRow
from tunefork.workflows.seeds import SeedsResult

_MARKS = {"error": "[bold red]error[/]", "warning": "[yellow]warning[/]", "info": "[dim]note[/]"}


def number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def show_plan(console: Console, plan: Plan) -> None:
    """The resolved recipe with reasons, the rows, the findings that are no errors, and the forecast."""
    job, recipe = plan.job, plan.job.recipe
    why = {reason.path: reason.why for reason in job.resolved.reasons}
    table = Table(title="Recipe, as it will run", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("key", style="bold", no_wrap=True)
    table.add_column("value and why", overflow="fold")
    guessed = [(reason.path, reason.value, reason.why) for reason in job.resolved.reasons if reason.guessed]
    for path, value, said in (*settings(recipe.model_dump(mode="json"), why), *guessed):
        table.add_row(path, f"{escape(_short(value))} [dim]· {escape(said)}[/]")
    console.print(table)
    console.print()
    for name, count in job.counts().items():
        trained = f", {count['trained_tokens']:,} of them trained" if count["trained_tokens"] else ""
        console.print(
            f"[bold]{name:5}[/] {words.count(count['rows'], 'row')}, {words.count(count['tokens'], 'token')}{trained}, "
            f"longest {count['longest']:,} [dim]{escape(job.origin.get(name, ''))}[/]",
            soft_wrap=True,
        )
    show_findings(console, [f for f in job.findings if f.level != "error"])  # those are what the run is refused for
    resolved = job.resolved
    console.print(
        f"\n{words.count(resolved.steps, 'step')} ({words.epochs(resolved.steps, resolved.steps_per_epoch)} of "
        f"{resolved.steps_per_epoch:,}); forecast: {duration(plan.forecast.seconds)} of training, "
        f"{size(plan.forecast.memory_bytes)} of memory at the peak.\n",
        soft_wrap=True,
    )


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Errors first; each with its first rows and what to do."""
    order = {"error": 0, "warning": 1, "info": 2}
    for finding in sorted(findings, key=lambda f: order[f.level]):
        where = f"{finding.split}: " if finding.split else ""
        advice = f" [dim]{escape(finding.advice)}[/]" if finding.advice else ""
        console.print(f"{_MARKS[finding.level]} {escape(where + finding.message)}{advice}", soft_wrap=True)
        if finding.level != "info":
            for example in finding.examples[:3]:
                console.print(f"      {escape(example)}", style="dim", soft_wrap=True)


def show_result(console: Console, result: Mapping[str, Any], where: str) -> None:
    """The result beside its baselines, with intervals."""
    if result["test"]:
        show_metrics(console, {**result["baselines"], "this run": result["test"]}, result.get("metric"))
        console.print(escape(verdict(RunFolder.open(Path(where), write=False))), soft_wrap=True)
    else:
        console.print("There were no test rows to measure on; what dev rows show is in the report.", soft_wrap=True)
    memory, hosted = result["peak_memory_bytes"], "hosted" in result
    peak = f"; peak {size(memory['value'])} ({memory['kind']}; forecast {size(memory['forecast'])})"
    took = f"trained {duration(result['seconds']['train'])}, measured {duration(result['seconds']['evaluate'])}"
    console.print(f"{took}{'' if hosted else peak}", soft_wrap=True)
    kept = "hosted.json" if hosted else "model/"
    console.print(f"[bold]{escape(where)}[/]  {kept} · result.json · report.html", soft_wrap=True)


def show_metrics(
    console: Console, columns: Mapping[str, Mapping[str, Mapping[str, Any]]], first: str | None = None
) -> None:
    """{name: {metric: {value, low, high, n}}} with a row a name and a column a metric; what is measured comes last."""
    metrics = list(dict.fromkeys(metric for column in columns.values() for metric in column))
    metrics.sort(key=lambda m: m != first)
    table = empty_table("", right=[metric.replace("_", " ") for metric in metrics])
    for name, column in columns.items():
        table.add_row(escape(name), *(interval(column.get(m), "\n" if len(metrics) > 2 else " ") for m in metrics))
    console.print(table)
    if said := caution([*columns.values()][-1]):
        console.print(said, soft_wrap=True)


def show_spread(console: Console, found: SeedsResult) -> None:
    """Each metric over the seeds, beside the baseline that is best in it on the first seed's test rows."""
    baselines = ("baseline, first seed",) if found.baselines else ()
    table = empty_table("metric", right=("mean", "sd", "min", "max", *baselines), title=f"{len(found.runs)} seeds")
    for metric, s in found.spread.items():
        measured = {name: m[metric]["value"] for name, m in found.baselines.items() if metric in m}
        best = (max if words.higher_is_better(metric) else min)(measured, key=measured.__getitem__, default=None)
        beside = [] if best is None else [f"{escape(best)} {words.decimal(measured[best])}"]
        table.add_row(metric, *(words.decimal(s[key]) for key in ("mean", "sd", "min", "max")), *beside)
    console.print(table if found.spread else "There were no test rows to measure on.")
    console.print(f"[bold]{escape(str(found.path))}[/]  seeds.json", soft_wrap=True)


def cell_line(name: str, cell: Cell | None) -> str:
    """One cell of a comparison as it begins (None), or with what came of it."""
    if cell is None:
        return f"[dim]{escape(name)} …[/]"
    if cell.error is not None:
        return f"[yellow]{escape(name)} failed:[/] {escape(cell.error)}"
    metric, figure = next(iter(cell.metrics.items()), ("no test rows", None))
    return f"[dim]{escape(name)}: {metric} {interval(figure)}, {duration(cell.seconds)}[/]"


def comparison_table(found: Comparison) -> Table:
    """Every cell with its choosing metric, difference to the best baseline, time and memory; intervals a line below.

    Fits 80 columns.
    """
    best = next((c.against_best_baseline["baseline"] for c in found.cells if c.against_best_baseline), "best baseline")
    table = empty_table("", right=(found.metric.replace("_", " "), f"minus {best}", "time", "memory"))
    for cell in found.cells:
        if cell.error is not None:
            table.add_row(escape(cell.name), "[yellow]failed[/]")
            continue
        versus, difference = cell.against_best_baseline, ""
        if versus:
            between = words.interval(versus["low"], versus["high"])
            difference = f"{words.decimal(versus['difference'], signed=True)}\n[dim]{between}[/]"
        value = interval(cell.metrics.get(found.metric), "\n")
        table.add_row(escape(cell.name), value, difference, duration(cell.seconds), size(cell.peak_memory_bytes))
    return table


def interval(figure: Mapping[str, Any] | None, between: str = " ") -> str:
    """`0.861 (0.838–0.883)`."""
    if figure is None:
        return "–"
    spread = words.spread(figure)
    return words.decimal(figure["value"]) + (f"{between}[dim]({spread})[/]" if spread else "")


def show_tokens(console: Console, row: ShownRow) -> None:
    """A row as the model sees it, a token a line; a character that takes several stands beside its first one."""
    styles = {"trained": "green", "right": "green", "candidate": "cyan", "cut": "red", "read": "magenta"}
    console.print(f"[dim]{escape(row.source)}[/]")
    for text, token, role in row.tokens:
        shown = escape(json.dumps(text, ensure_ascii=False)) if text else "⋮"
        style = styles.get(role.split()[0], "dim")
        console.print(f"{token:>8}  {role:11} {shown}", style=style, soft_wrap=True)


def _short(value: Any) -> str:
    if isinstance(value, (list, dict)):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else text[:197] + "…"
