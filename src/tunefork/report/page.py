"""The page: what the template is given, and the file."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tunefork import words
from tunefork.evaluate.summary import caution
from tunefork.recipe.load import settings
from tunefork.report import figures
from tunefork.report.confusions import find_confusions
from tunefork.report.examples import show_changes, show_samples
from tunefork.report.reading import Record, read_record
from tunefork.report.verdict import Comparison, compare_with_best, headline, sentence
from tunefork.run import RunFolder

_ENVIRONMENT = Environment(
    loader=PackageLoader("tunefork.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(
    decimal=words.decimal,
    percent=words.percent,
    count=words.count,
    duration=words.duration,
    size=words.size,
    clean=words.clean,
    trimmed=words.trimmed,
    metric=words.metric_name,
    sentence=words.sentence_case,
)
_LEVELS = {"error": "refused", "warning": "warning", "info": "note"}


@dataclass(frozen=True, slots=True)
class Line:
    """A system in the table of results: one figure a metric, None where it was not measured."""

    name: str
    figures: Sequence[Mapping[str, Any] | None]
    seconds: float | None
    notes: Sequence[str]
    ours: bool
    best: bool  # of the baselines


@dataclass(frozen=True, slots=True)
class Setting:
    """A line of the recipe, and why it says what it says."""

    path: str
    value: str
    why: str


def write_report(path: str | Path) -> Path:
    """Writes report.html into the run folder `path`, from what is kept there, and returns where it lies.

    Raises MissingFileError or RunError when there is no finished run, or another process is writing there.
    """
    with RunFolder.open(path, write=True) as run:
        run.write_report(render_report(run))
        return run.report_path


def render_report(run: RunFolder) -> str:
    """The report of a finished run as one HTML page: no script, nothing fetched, every text of others escaped.

    Raises RunError when the run is not finished or cannot be read.
    """
    record = read_record(run)
    comparison = compare_with_best(record)
    template = _ENVIRONMENT.get_template("page.html.j2")
    return template.render(**_view(record, comparison)).lstrip()


def _view(record: Record, comparison: Comparison | None) -> dict[str, Any]:
    result = record.result
    recipe = result["recipe"]
    metrics = _metrics(record)
    baseline = words.baseline_name(comparison.baseline) if comparison is not None else ""
    return {
        "style": Markup(page_style()),
        "title": f"{words.short_name(recipe['task']['name'])} with {words.short_name(recipe['model']['name'])}",
        "system": words.system_name(recipe),
        "headline": headline(record, comparison),
        "outcome": comparison.outcome if comparison is not None else "alone",
        "verdict": sentence(record, comparison),
        "caution": words.sentence_case(caution(result["test"], words.metric_name)),
        "result": result,
        "metrics": metrics,
        "metric": record.metric,
        "lower": [words.metric_name(m) for m in metrics if not words.higher_is_better(m)],
        "confidence": f"{100 * record.recipe.evaluate.confidence:g}",
        "lines": _lines(record, metrics, comparison),
        "dots": Markup(_dots(record)) if len(_measured(record)) > 1 else "",
        "comparison": comparison,
        "baseline": baseline,
        "baseline_label": baseline.partition(" + ")[0],
        "p_value": words.probability(comparison.difference.p_value) if comparison is not None else "",
        "curves": _curves(record),
        "by_forwards": _forwards(record) is not None,
        "epochs": _epochs(record),
        "stopped": [] if "stopped" in metrics else _stopped(record),
        "confusions": find_confusions(record),
        "gained": _changes(record, comparison, "gained"),
        "lost": _changes(record, comparison, "lost"),
        "samples": show_samples(record),
        "counts": result["data"]["counts"],
        "tokens_trained": any(split["trained_tokens"] for split in result["data"]["counts"].values()),
        "origin": result["data"]["origin"],
        "findings": _findings(result["data"]["findings"]),
        "settings": _settings(record),
        "recipe_text": record.recipe_text,
        "cost": _cost(record),
        "command": f"tunefork train {shlex.quote(str(record.path / 'recipe.yaml'))} --out runs/again",
        "again": f"tunefork report {shlex.quote(str(record.path))}",
        "spread": words.spread,
        "hosted": "hosted" in result,
    }


def _metrics(record: Record) -> list[str]:
    """The choosing metric first."""
    everyone = [record.result["test"], *record.result["baselines"].values()]
    named = dict.fromkeys(name for system in everyone for name in system)
    return sorted(named, key=lambda name: name != record.metric)


def _lines(record: Record, metrics: Sequence[str], comparison: Comparison | None) -> list[Line]:
    result = record.result
    if not result["test"]:
        return []
    system = words.sentence_case(words.system_name(result["recipe"]))
    lines = [Line(system, [result["test"].get(m) for m in metrics], result["seconds"]["train"], (), True, False)]
    for name in _by_value(record):
        about = result["baseline_notes"].get(name, {"seconds": None, "notes": ()})
        best = comparison is not None and name == comparison.baseline
        found = [result["baselines"][name].get(m) for m in metrics]
        lines.append(Line(words.baseline_name(name), found, about["seconds"], about["notes"], False, best))
    return lines


def _by_value(record: Record) -> list[str]:
    """Baselines, best first; those without the choosing metric last."""
    sign = -1.0 if words.higher_is_better(record.metric) else 1.0
    baselines = record.result["baselines"]
    return sorted(
        baselines,
        key=lambda name: (
            sign * baselines[name][record.metric]["value"] if record.metric in baselines[name] else float("inf")
        ),
    )


def _measured(record: Record) -> list[figures.Dot]:
    """This run and the baselines that have the choosing metric, in the table's order."""
    result, metric = record.result, record.metric
    systems = [(words.sentence_case(words.system_name(result["recipe"])), result["test"], True)]
    systems += [(words.baseline_name(name), result["baselines"][name], False) for name in _by_value(record)]
    return [
        figures.Dot(name, found[metric]["value"], found[metric]["low"], found[metric]["high"], ours)
        for name, found, ours in systems
        if metric in found
    ]


def _dots(record: Record) -> str:
    return figures.dot_plot(_measured(record), record.metric)


def _curves(record: Record) -> list[tuple[str, Markup]]:
    """(caption, plot), as many as there is something to show of."""
    found: list[tuple[str, str]] = []
    objective = record.recipe.zo.objective
    if record.steps:
        told, name = (objective, "objective") if objective != "loss" else ("loss", "loss")
        caption = f"Training {words.metric_name(told)}, each step and smoothed"
        found.append((caption, figures.smoothed_plot(record.steps, name)))
    looks = record.result["train"]["looks"]
    if looks:
        kept = record.result["train"]["weights_from_step"]
        chosen = kept if any(look["step"] == kept for look in looks) else None
        which = "; ringed: the weights that were kept" if chosen is not None else ""
        metric = words.sentence_case(words.metric_name(looks[0]["metric"]))
        forwards = _forwards(record)
        against = " against row-forwards" if forwards else ""
        found.append((f"{metric} on dev{against}{which}", figures.look_plot(looks, chosen, forwards)))
    if _measures("projected_gradient", record):
        caption = "Projected gradients, root mean square, each step and smoothed"
        found.append((caption, figures.smoothed_plot(record.steps, "projected_gradient")))
    for name, caption in (("learning_rate", "Learning rate"), ("gradient_norm", "Gradient norm, before clipping")):
        if _measures(name, record):
            found.append((caption, figures.scalar_plot(record.steps, name)))
    return [(caption, Markup(plot)) for caption, plot in found]


def _measures(name: str, record: Record) -> bool:
    return sum(step.get(name) is not None for step in record.steps) > 1


def _forwards(record: Record) -> dict[int, float] | None:
    """Rows times evaluations up to the end of each step, the calibration's included; None where no step counts them."""
    if not record.steps or any("row_forwards" not in step for step in record.steps):
        return None
    totals = itertools.accumulate(float(step["row_forwards"]) for step in record.steps)
    return {0: 0.0, **dict(zip((int(step["step"]) for step in record.steps), totals, strict=True))}


def _epochs(record: Record) -> str:
    per_epoch = record.result.get("steps_per_epoch")  # a service that trains does not tell it
    return words.epochs(record.result["steps"], per_epoch) if per_epoch else ""


def _stopped(record: Record) -> list[tuple[str, int, int]]:
    """(system, answers that ended by themselves, answers) where text was generated."""
    name = words.sentence_case(words.system_name(record.result["recipe"]))
    systems = [(name, record.predictions)]
    systems += [(words.baseline_name(b), record.baselines[b]) for b in _by_value(record)]
    known = [(name, [p.stopped for p in said if p.stopped is not None]) for name, said in systems]
    return [(name, sum(stopped), len(stopped)) for name, stopped in known if stopped]


def _changes(record: Record, comparison: Comparison | None, which: str) -> list[Any]:
    if comparison is None:
        return []
    changes = comparison.gained if which == "gained" else comparison.lost
    return show_changes(record, comparison.baseline, changes)


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    order = list(_LEVELS)
    return [
        {**finding, "word": _LEVELS[finding["level"]]}
        for finding in sorted(findings, key=lambda finding: order.index(finding["level"]))
    ]


def _settings(record: Record) -> list[Setting]:
    why = {reason["path"]: reason["why"] for reason in record.result["reasons"]}
    return [Setting(path, words.setting(value), said) for path, value, said in settings(record.result["recipe"], why)]


def _cost(record: Record) -> list[tuple[str, str]]:
    result, recipe = record.result, record.recipe
    memory, tokens = result["peak_memory_bytes"], record.steps[-1].get("tokens") if record.steps else None
    train = result["seconds"]["train"]
    speed = f" ({tokens / train:,.0f} tokens a second)" if tokens and train else ""
    cost = [
        ("training", words.duration(train) + speed),
        ("measuring", words.duration(result["seconds"]["evaluate"])),
        ("steps", words.count(result["steps"])),
        ("forwards in training", f"{words.count(result['forwards'])} (rows × loss evaluations)"),
        ("peak memory", words.size(memory["value"]) + (f" {memory['kind']}" if memory["value"] is not None else "")),
        ("peak memory, forecast", words.size(memory["forecast"]) + _off(memory["value"], memory["forecast"])),
        ("model", _model(result)),
        ("device and number format", f"{recipe.model.device}, {recipe.model.dtype}"),
    ]
    found = {key: value for key, value in result["environment"].items() if value is not None and key != "dtype"}
    device = found.pop("device", None)
    if device is not None:
        cost[-1] = ("device and number format", f"{device}, {recipe.model.dtype}")
    return [*cost, ("versions and settings", ", ".join(f"{key} {value}" for key, value in found.items()))]


def _model(result: Mapping[str, Any]) -> str:
    """The base, its size; of a hosted run what was trained, and what that cost."""
    if (hosted := result.get("hosted")) is None:
        return f"{result['model']['name']}, {words.count(result['model']['parameters'])} parameters"
    text = f"{result['model']['name']}, tuned by job {hosted['job']} into {hosted['model']}"
    if hosted["trained_tokens"] is not None:
        text += f", {words.count(hosted['trained_tokens'])} trained tokens"
    cost = hosted["training_cost"]
    return text + (f", ${cost:,.2f} by the prices of {hosted['prices']['date']}" if cost else "")


def _off(value: float | None, forecast: float | None) -> str:
    if not value or forecast is None:
        return ""
    off = round(100 * (forecast - value) / value)
    return f" ({off:+d}\N{NARROW NO-BREAK SPACE}%)".replace("-", words.MINUS) if off else " (as measured)"


def environment() -> Environment:
    """The templates of this room, with its filters."""
    return _ENVIRONMENT


def page_style() -> str:
    """The style sheet of every page."""
    loader = _ENVIRONMENT.loader
    assert loader is not None
    return loader.get_source(_ENVIRONMENT, "style.css")[0]
