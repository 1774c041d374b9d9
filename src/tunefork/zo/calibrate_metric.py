"""Epsilon and a first learning rate for a value that changes only where an answer does: a metric.

Near the weights such a value is flat, and all probes tie; its slope is that of its mean over a neighbourhood as wide as
epsilon. An answer that changes counts the same whatever epsilon is, so slopes have less noise the larger it is, until
answers change for the worse on both sides alike and say little about the middle. So epsilon is the largest at which the
probes' mean has not (beyond its own error) fallen by half of what their sides differ by, among those at which the sides
of at least half of the probes differ.

How far the mean falls is the curvature, and lr follows from it as for a loss. Both come from few answers: a fall that
is smaller than what it may be off by is taken to be that large, and the next batches are asked as well. From one alone
lr was up to eight times as large on one seed as on another, and runs with the larger ones unlearned their start
(benchmarks/zo_objective.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tunefork.zo.calibrate import LAST, Calibration, averaged, suited_lr
from tunefork.zo.engine import Engine, Uninterrupted
from tunefork.zo.measured import Measured
from tunefork.zo.probes import Probe
from tunefork.zo.updates import Rule

LADDER = tuple(10.0 ** (k / 2) for k in range(-7, 0))
"""Epsilons tried: half decades from 3e-4 to 0.3."""

_DIFFER = 0.5  # of the probes: this share must have sides that differ
_FALL = 0.5  # of the size of a difference
_TRIED = 16  # probes at each epsilon
_PROBES = 64  # at the chosen one
_SHARE = (0.1, 1.0)  # bounds of the part of a slope's square that the rows agree on: of so few answers less is not seen


def calibrate_metric(
    engine: Engine, make_probe: Callable[[], Probe], rule: Rule, given: float | None = None
) -> Calibration:
    """Chooses epsilon, where none is `given`, and lr. Raises ArithmeticError where no epsilon changes an answer."""
    ladder = LADDER if given is None else (given,)
    queries, spent = engine.queries, 0

    def probes(steps: range, signs: tuple[int, int], epsilon: float) -> list[Measured]:
        nonlocal spent
        found = _probes(engine, make_probe, steps, signs, epsilon)
        spent += sum(m.forwards for m in found)
        return found

    here = probes(range(1), (0, 0), ladder[0])[0].first  # of each query's rows
    few, many = (-(-n // queries) for n in (_TRIED, _PROBES))
    epsilon, differ, seen = 0.0, 0.0, list[Measured]()
    for tried in ladder:
        found = probes(range(few), (1, -1), tried)
        differences, falls = _sides(found, here)
        share = float(np.mean(differences != 0))
        off = float(np.std(falls)) / math.sqrt(len(falls))
        steady = float(np.mean(falls)) - off <= _FALL * _size(differences)
        if (steady and share >= _DIFFER) or (differ < _DIFFER and share > differ):
            epsilon, differ, seen = tried, share, found
        if not steady and share >= _DIFFER:
            break
    if not epsilon:
        raise ArithmeticError(
            f"A probe must change an answer for a metric to have a slope. Received {-here[0]:g} on both sides of all "
            f"probes: no answer changes up to epsilon {ladder[-1]:g}. Try more rows a step, or the loss as objective."
        )
    seen += probes(range(few, many), (1, -1), epsilon)
    differences, falls = _sides(seen, here)
    fall, curvature = float(np.mean(falls)), _curvature(differences, falls, epsilon)
    slopes = [(m.first - m.second)[m.shares > 0] / (2 * epsilon) for m in seen]
    squares, share = _agreement(seen, differences, queries, epsilon)
    lr = suited_lr(queries, share, curvature, rule, slopes)
    epsilon = float(f"{epsilon:.2g}") if given is None else given
    reason = (
        f"epsilon {epsilon:g} {'was given, and' if given else 'is wide enough:'} {differ:.0%} of the probes change the "
        f"metric, and its mean over them is {-fall:+.2g} of what it is without (a probe's sides differ by "
        f"{_size(differences):.2g}). lr {lr:g} is a quarter of what suits a curvature of at most {curvature:.3g} along "
        f"a direction, {queries} {'query' if queries == 1 else 'queries'}, and slopes of "
        f"{math.sqrt(squares):.3g} of whose square {share:.0%} is what the rows agree on."
    )
    return Calibration(epsilon, lr, math.sqrt(squares), curvature, 0.0, share, spent, reason)


def refined_metric(found: Calibration, engine: Engine, make_probe: Callable[[], Probe], rule: Rule) -> Calibration:
    """With curvature and agreement on one more batch; epsilon stays. `forwards` are this batch's."""
    few, epsilon = -(-_TRIED // engine.queries), found.epsilon
    first = _PROBES + found.batches * few  # directions that no batch has seen
    middle = _probes(engine, make_probe, range(first, first + 1), (0, 0), epsilon)
    seen = _probes(engine, make_probe, range(first, first + few), (1, -1), epsilon)
    differences, falls = _sides(seen, middle[0].first)
    spent = sum(m.forwards for m in (*middle, *seen))
    if not np.isfinite(falls).all():
        raise FloatingPointError("The metric must be finite near the weights. Received one that is not.")
    if not differences.any():  # all tie: nothing is known
        return replace(found, batches=found.batches + 1, forwards=spent)
    squares, share = _agreement(seen, differences, engine.queries, epsilon)
    return averaged(found, rule, _curvature(differences, falls, epsilon), squares, share, spent)


def _probes(
    engine: Engine, make_probe: Callable[[], Probe], steps: range, signs: tuple[int, int], epsilon: float
) -> list[Measured]:
    with Uninterrupted() as signals:
        return [engine.measure(make_probe(), signals, signs, LAST - i, epsilon) for i in steps]


def _curvature(differences: np.ndarray, falls: np.ndarray, epsilon: float) -> float:
    spread = max(float(np.std(falls)), _size(differences) / 2)
    return 2 * max(float(np.mean(falls)), spread / math.sqrt(len(falls))) / epsilon**2


def _agreement(
    measured: Sequence[Measured], differences: np.ndarray, queries: int, epsilon: float
) -> tuple[float, float]:
    """Mean square of the slopes, and the part of it that the rows agree on."""
    square = float(np.mean(differences**2)) / (2 * epsilon) ** 2
    pairs = [
        p for m in measured if m.by_row for j in range(queries) if (p := _agreed(m.by_row(j), epsilon)) is not None
    ]
    return square, float(np.clip(np.mean(pairs) / square, *_SHARE)) if pairs and square else _SHARE[0]


def _sides(measured: Sequence[Measured], here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[probes that saw rows]: how far the two sides differ, and how much worse their mean is than the middle."""
    differ = np.concatenate([(m.first - m.second)[m.shares > 0] for m in measured])
    return differ, np.concatenate([((m.first + m.second) / 2 - here)[m.shares > 0] for m in measured])


def _agreed(differences: np.ndarray, epsilon: float) -> float | None:
    """Mean product of two different rows' slopes: unbiased for the square of the slope that all rows share."""
    slopes = differences / (2 * epsilon)
    m = len(slopes)
    return float((slopes.sum() ** 2 - (slopes**2).sum()) / (m * (m - 1))) if m > 1 else None


def _size(differences: np.ndarray) -> float:
    return math.sqrt(float(np.mean(differences**2)))
