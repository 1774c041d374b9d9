"""Zeroth-order or back-propagation: which to take for this model, these rows and this memory, from measured runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunefork import words
from tunefork.metrics import Paired


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table: a baseline, or a method with an adapter."""

    name: str  # "tfidf", "lora", "backprop/lora"
    kind: str  # "baseline" or "trained"
    metrics: Mapping[str, Mapping[str, Any]]
    seconds: float
    peak_memory_bytes: int | None
    against_best_baseline: Mapping[str, Any] | None  # baseline, and the fields of Paired
    error: str | None = None
    method: str | None = None
    activation_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class Advice:
    """The cell to take (None: none of them), why, and the paired difference zo - back-propagation where both fit."""

    use: str | None
    sentence: str
    memory_limit_bytes: int | None
    difference: Mapping[str, float] | None = None


def advise(
    metric: str, cells: Sequence[Cell], limit: int | None, paired: Callable[[Cell, Cell], Paired]
) -> Advice | None:
    """Advice from measured cells; None unless both zo and back-propagation are among them.

    Args:
        limit: bytes that a run may take at its peak.
        paired: the difference of two cells in `metric`, on the same rows.
    """
    zo, backprop = ([c for c in cells if c.method == method] for method in ("zo", "backprop"))
    if not zo or not backprop:
        return None
    higher = words.higher_is_better(metric)

    def best(among: Sequence[Cell]) -> Cell | None:
        fitting = [c for c in among if _fits(c, limit) and metric in c.metrics]
        return (max if higher else min)(fitting, key=lambda c: c.metrics[metric]["value"]) if fitting else None

    ours, theirs = best(zo), best(backprop)
    if ours is None or theirs is None:
        take, rest = (theirs, zo) if ours is None else (ours, backprop)
        why = _unfit(rest, limit)
        if take is None:
            return Advice(None, f"Neither fits: {_unfit(backprop, limit)}; {_unfit(zo, limit)}.", limit)
        return Advice(take.name, f"Use {take.name}: {why}; {_reached(take, metric)}.{_doubt(take, metric)}", limit)

    found = paired(ours, theirs)
    clear = found.clear
    better = clear and (found.difference > 0) == higher
    lighter = (ours.peak_memory_bytes or 0) < (theirs.peak_memory_bytes or 0)
    take, other = (ours, theirs) if better or (not clear and ours.seconds < theirs.seconds) else (theirs, ours)
    fits = "back-propagation fits" + (f" in {words.size(limit)}" if limit is not None else "")
    reasons = {
        (True, True): "it is better on these rows",
        (False, True): "these rows do not tell the two apart, and it takes less time",
        (False, False): f"{fits}, and these rows do not tell the two apart",
        (True, False): f"{fits}, and is better on these rows",
    }
    sentence = (
        f"Use {take.name}: {reasons[clear, take is ours]}. {words.sentence_case(_reached(take, metric))}, "
        f"{_reached(other, metric)}; the difference is {words.decimal(found.difference, signed=True)} "
        f"({words.interval(found.low, found.high)}) for {ours.name}."
    )
    if take is theirs and lighter:
        sentence += f" With less memory than {words.size(theirs.peak_memory_bytes)} use {ours.name}."
    difference = {"difference": found.difference, "low": found.low, "high": found.high, "p_value": found.p_value}
    return Advice(take.name, sentence + _doubt(take, metric), limit, difference)


def _fits(cell: Cell, limit: int | None) -> bool:
    return cell.error is None and (limit is None or cell.peak_memory_bytes is None or cell.peak_memory_bytes <= limit)


def _unfit(cells: Sequence[Cell], limit: int | None) -> str:
    """Why none of one method's cells can be taken."""
    measured = [c for c in cells if c.error is None and c.peak_memory_bytes is not None and not _fits(c, limit)]
    if not measured:
        return f"{cells[0].name} was not measured ({(cells[0].error or 'no test rows').rstrip('.')})"
    least = min(measured, key=lambda c: c.peak_memory_bytes or 0)
    return f"{_named(least)} took {words.size(least.peak_memory_bytes)}, more than {words.size(limit)}"


def _reached(cell: Cell, metric: str) -> str:
    cost = f"{words.size(cell.peak_memory_bytes)} and {words.duration(cell.seconds)}"
    return f"{_named(cell)} reached {words.metric_name(metric)} {words.value(cell.metrics[metric])} with {cost}"


def _named(cell: Cell) -> str:
    return cell.name + (" with activation checkpointing" if cell.activation_checkpointing else "")


def _doubt(cell: Cell, metric: str) -> str:
    """What must be said where no training is better than a baseline."""
    against = cell.against_best_baseline
    if against is None or (against["clear"] and (against["difference"] > 0) == words.higher_is_better(metric)):
        return ""
    if against["clear"]:
        return f" But the baseline {against['baseline']} is clearly better."
    return f" But it is not clearly better than the baseline {against['baseline']}."
