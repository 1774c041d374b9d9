"""The verdict: the result beside the best baseline, on the same rows, in one sentence that does not overclaim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunefork import words
from tunefork.evaluate.summary import Change, compare_predictions, gained_lost
from tunefork.metrics import Paired
from tunefork.report.reading import Record, read_record
from tunefork.run import RunFolder


@dataclass(frozen=True, slots=True)
class Comparison:
    """This run against the best baseline. `difference` is run - baseline in the choosing metric."""

    baseline: str
    difference: Paired
    gained: list[Change]  # rows the run answers better, largest difference first
    lost: list[Change]
    outcome: Literal["better", "worse", "unclear"]  # unclear unless interval and p-value agree on a difference


def verdict(run: RunFolder) -> str:
    """The outcome of a finished run as the report says it, headline and sentence."""
    record = read_record(run)
    comparison = compare_with_best(record)
    return f"{headline(record, comparison)}. {sentence(record, comparison)}"


def compare_with_best(record: Record) -> Comparison | None:
    """The paired comparison with the baseline that has the best choosing metric; None where there is none."""
    metric, higher = record.metric, words.higher_is_better(record.metric)
    measured = {name: m[metric]["value"] for name, m in record.result["baselines"].items() if metric in m}
    if not measured or metric not in record.result["test"]:
        return None
    best = (max if higher else min)(measured, key=lambda name: measured[name])
    theirs = record.baselines[best]
    found = compare_predictions(record.task, record.predictions, theirs, record.recipe.evaluate, record.recipe.seed)
    if metric not in found:
        return None
    gained, lost = gained_lost(record.task, theirs, record.predictions)
    return Comparison(best, found[metric], gained, lost, _outcome(found[metric], higher))


def headline(record: Record, comparison: Comparison | None) -> str:
    """The outcome in a few words."""
    if not record.result["test"]:
        return "Not measured on test rows"
    if comparison is None:
        return "Measured, with nothing beside it"
    return {
        "better": "Better than the best baseline",
        "worse": "A baseline is better",
        "unclear": "No clear difference to the best baseline",
    }[comparison.outcome]


def sentence(record: Record, comparison: Comparison | None) -> str:
    """One sentence: what was reached, what the best baseline reaches, and how sure the difference is."""
    system = words.sentence_case(words.system_name(record.result["recipe"]))
    test, metric = record.result["test"], record.metric
    if metric not in test:
        return _without_test(record, system)
    reached = f"{system} reached {_figure(metric, test[metric])} on {words.count(test[metric]['n'], 'test row')}"
    if comparison is None:
        return f"{reached}; no baseline was measured beside it, so there is nothing to compare it with."
    best = record.result["baselines"][comparison.baseline][metric]
    only = len([m for m in record.result["baselines"].values() if metric in m]) == 1
    name = words.baseline_in_words(comparison.baseline)
    them = f"the {'one baseline' if only else 'best baseline'}, {name}, {words.value(best)}"
    return f"{reached}; {them}; {_difference(record, comparison)}."


def _outcome(paired: Paired, higher: bool) -> Literal["better", "worse", "unclear"]:
    if not paired.clear:
        return "unclear"
    return "better" if (paired.difference > 0) == higher else "worse"


def _difference(record: Record, comparison: Comparison) -> str:
    paired = comparison.difference
    level = f"{100 * record.recipe.evaluate.confidence:g}{words.percent(0)[1:]}"
    lower = "" if words.higher_is_better(record.metric) else " (lower is better)"
    text = f"the difference is {words.decimal(paired.difference)}{lower}, {level} interval "
    text += words.interval(paired.low, paired.high)
    if comparison.outcome == "unclear":
        why = "which includes zero"
        if not paired.low <= 0 <= paired.high:
            why = f"but {words.probability(paired.p_value)} in the paired test"
        return f"{text}, {why}: these rows do not tell the two apart"
    return text if comparison.outcome == "better" else f"{text}: the baseline is better"


def _without_test(record: Record, system: str) -> str:
    looks = [look for look in record.result["train"]["looks"] if look["better"]]
    steps = words.count(record.result["steps"], "step")
    if not looks:
        return f"{system} ran for {steps}; there were no test and no dev rows, so nothing is known of how good it is."
    best = looks[-1]
    return (
        f"{system} was best on the dev rows at step {best['step']:,} of {record.result['steps']:,}, with "
        f"{words.metric_name(best['metric'])} {words.decimal(best['value'])}; the weights were chosen on these rows "
        "and there were no test rows, so on new text expect less."
    )


def _figure(metric: str, figure: Mapping[str, Any]) -> str:
    unit = " nats a token" if metric == "loss" else ""
    article = "a " if metric == "loss" else ""
    return f"{article}{words.metric_name(metric)}{' of' if metric == 'loss' else ''} {words.value(figure)}{unit}"
