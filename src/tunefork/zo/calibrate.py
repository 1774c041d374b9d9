"""Epsilon and a first learning rate for this model and task, measured along a few random directions.

Along each direction z the loss is read at the middle and on both sides for a ladder of epsilons. A slope that is off
from the one at the next smaller epsilon shows curvature's change (bias), one that is off at the small end shows
rounding (noise). The largest epsilon that is in the straight part, and above the noise, is taken.

The second difference is z^T H z. A step of c z changes the loss by c s + c^2 z^T H z / 2, so with q queries of slope g,
measured on rows that are only a sample, the best step has lr = q E[g s] / (E[g^2] z^T H z). Of the square of one row's
slope only a small part, E[g s] / E[g^2], is what all rows agree on. At the start, where what must be learned first is
which answers there are, it is large (0.07 on TREC), and steps of that size did not last. So it is not measured but
taken to be what whole runs were seen to bear (benchmarks/zo_learning.py).

Few rows say little about z^T H z: from one batch of two to the next it changes by more than its size, and its sign. Of
several batches it is the mean size that counts, which no step should overshoot on. While a model learns it grows, to
its double or triple within some thousand steps, so a long run goes on measuring it, and the mean is a running one.
It is never taken to be below what it was at first: of rows that are learned by heart it says nothing about others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tunefork.zo.engine import Engine, Uninterrupted
from tunefork.zo.probes import Probe
from tunefork.zo.updates import Rule

BATCHES = 8
"""Curvature is the mean over so many at the start, and a running mean of that length later."""

LADDER = tuple(10.0 ** (k / 2) for k in range(-8, -1))
"""Epsilons tried: half decades from 1e-4 to 0.1."""

_BIAS = 0.1  # share of the slope by which an epsilon may be off
_CAUTION = 0.25  # of the best step's length: directions add up, and curvature grows on the way
_ROW_SHARE = 0.02  # part of the square of one row's slope that all rows agree on
_DIRECTIONS = 6  # at least, of a batch
_UNKNOWN_ROWS = 16  # in a closure's batch
LAST = 2**32 - 1  # steps whose directions no run reaches


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured and chosen, and a sentence that says why."""

    epsilon: float
    lr: float
    slope: float  # root mean square of the projected gradients
    curvature: float  # of z^T H z: size of its mean over directions plus that one's standard error; mean over batches
    noise: float  # standard deviation of one loss from rounding; not asked of a metric
    share: float  # part of the slopes' square that the rows agree on
    forwards: int
    reason: str
    batches: int = 1  # that curvature was measured on, so far
    least: float = 0.0  # curvature that a later one is not below: that on the first batches


def calibrate(engine: Engine, make_probe: Callable[[], Probe], rule: Rule, given: float | None = None) -> Calibration:
    """Chooses epsilon, where none is `given`, and lr for a loss; the model is left as it is.

    Raises FloatingPointError where the loss is finite at no epsilon, or does not bend.
    """
    ladder = LADDER if given is None else (given,)
    slopes, bend, rows, forwards = _along(engine, make_probe, LAST, ladder)
    slope = np.concatenate(slopes, axis=1)  # [epsilons, directions]
    usable: np.ndarray = np.asarray(np.isfinite(slope).all(axis=1) & np.isfinite(bend).all(axis=1))
    if not usable.any():
        raise FloatingPointError("The loss must be finite near the weights. Received none that is, at any epsilon.")
    chosen, noise, size, bias = _epsilon(np.array(ladder), slope, bend, usable, engine.estimator.span)
    curvature = _size(bend[chosen])
    if not curvature:
        raise FloatingPointError(
            "The loss must bend along random directions for a learning rate to be measured. Received one that does "
            f"not, at epsilon {ladder[chosen]:g}. Try a larger zo.epsilon, or zo.calibrate=false with a rate."
        )
    share = rows * _ROW_SHARE / (1 + rows * _ROW_SHARE)
    lr = suited_lr(engine.queries, share, curvature, rule, [s[chosen] for s in slopes])
    epsilon = float(f"{ladder[chosen]:.2g}") if given is None else given
    straight = (
        f"the largest at which slopes are straight (off by {bias:.0%} from the next smaller; rounding moves a loss by "
        f"{noise:.1g}, a probe by {size * epsilon:.1g})"
    )
    queries = f"{engine.queries} {'query' if engine.queries == 1 else 'queries'}"
    reason = (
        f"epsilon {epsilon:g} is {'the one given' if given else straight}. lr {lr:g} is a quarter of what suits "
        f"a curvature of {curvature:.3g} along a direction, and {queries} whose slopes over {rows} "
        f"{'row' if rows == 1 else 'rows'} are taken to be chance but for {share:.1%} of their square."
    )
    return Calibration(epsilon, lr, size, curvature, noise, share, forwards, reason)


def refined(found: Calibration, engine: Engine, make_probe: Callable[[], Probe], rule: Rule) -> Calibration:
    """With the curvature on one more batch; lr follows from it, epsilon stays. `forwards` are this batch's.

    Where a rule divides slopes by their size, lr follows that too.
    """
    slopes, bend, _, forwards = _along(engine, make_probe, LAST - found.batches * _DIRECTIONS, (found.epsilon,))
    if not (np.isfinite(bend).all() and np.isfinite(slopes).all()):
        raise FloatingPointError(f"The loss must be finite near the weights. Received one that is not: {bend[0]}.")
    return averaged(found, rule, _size(bend[0]), float(np.mean(np.square(slopes))), found.share, forwards)


def averaged(
    found: Calibration, rule: Rule, curvature: float, square: float, share: float, forwards: int
) -> Calibration:
    """With what one more batch gave: curvature, mean square of slopes, and the part of it that its rows agree on."""
    batches = found.batches + 1
    weight = 1 / min(batches, BATCHES)
    curvature = max(found.least, found.curvature + weight * (curvature - found.curvature))
    share = found.share + weight * (share - found.share)
    slope = math.hypot(math.sqrt(1 - weight) * found.slope, math.sqrt(weight * square))
    lr = found.lr * found.curvature / curvature * share / found.share
    if rule.normaliser != "none":
        lr *= slope / (found.slope or 1.0)
    return replace(
        found,
        lr=(lr := float(f"{lr:.3g}")),
        slope=slope,
        curvature=curvature,
        share=share,
        batches=batches,
        least=curvature if batches == BATCHES else found.least,
        forwards=forwards,
        reason=f"lr {lr:g} is what suits the curvature on {batches} batches, {curvature:.3g} along a direction.",
    )


def suited_lr(queries: int, share: float, curvature: float, rule: Rule, slopes: Sequence[np.ndarray]) -> float:
    """To two digits, for a rule that is given slopes [queries] like those of these steps."""
    lr = _CAUTION * queries * share / max(curvature, 1e-30)
    if rule.normaliser == "rms":
        lr *= math.sqrt(float(np.mean(np.concatenate(slopes) ** 2)))
    elif rule.normaliser == "std":
        lr *= float(np.mean([np.std(s) for s in slopes]))
    lr /= sum(rule.momentum**age for age in range(rule.window))
    return float(f"{lr:.2g}")


def _size(bends: np.ndarray) -> float:
    """Of the mean over directions, with its error: no small number where their curvatures cancel."""
    return abs(float(np.mean(bends))) + float(np.std(bends)) / math.sqrt(len(bends))


def _along(
    engine: Engine, make_probe: Callable[[], Probe], last: int, ladder: Sequence[float]
) -> tuple[list[np.ndarray], np.ndarray, int, int]:
    """Along the directions of step `last` and a few before it: slopes a step [epsilons, queries], second differences
    [epsilons, directions], rows of a query, forwards."""
    one_sided, span = 0 in engine.estimator.signs, engine.estimator.span
    slopes, bends, rows, forwards = [], [], 0, 0
    for step in range(last, last - -(-_DIRECTIONS // engine.queries), -1):
        with Uninterrupted() as signals:
            middle = engine.measure(make_probe(), signals, (0, 0), step, ladder[0])
            sides = [engine.measure(make_probe(), signals, (1, -1), step, epsilon) for epsilon in ladder]
        here = middle.first
        pairs = list(zip(sides, ladder, strict=True))
        seen = middle.shares > 0  # queries that have rows
        slopes.append(np.stack([(m.first - (here if one_sided else m.second)) / (span * e) for m, e in pairs])[:, seen])
        bends.append(np.stack([(m.first + m.second - 2 * here) / e**2 for m, e in pairs])[:, seen])
        by_row = sides[0].by_row
        rows = _UNKNOWN_ROWS if by_row is None else len(by_row(int(np.argmax(seen))))
        forwards += sum(m.forwards for m in (middle, *sides))
    return slopes, np.concatenate(bends, axis=1), rows, forwards


def _epsilon(
    ladder: np.ndarray, slope: np.ndarray, bend: np.ndarray, usable: np.ndarray, span: int
) -> tuple[int, float, float, float]:
    """The place of the epsilon to use, the loss's rounding noise, the slopes' size, and the bias there."""
    smallest = int(np.argmax(usable))
    steadiest = int(np.argmin(np.where(usable, np.std(np.where(np.isfinite(bend), bend, 0.0), axis=1), np.inf)))
    left = (bend[smallest] - bend[steadiest]) * ladder[smallest] ** 2  # what is not curvature: L+ + L- - 2 L0
    noise = math.sqrt(float(np.mean(left**2)) / 6) if steadiest != smallest else 0.0
    errors, biases = np.full(len(ladder), np.inf), np.full(len(ladder), np.inf)
    for i in np.flatnonzero(usable):
        size = math.sqrt(float(np.mean(slope[i] ** 2))) or 1e-30
        below = max(i - 1, smallest)
        rounding = 2 * (noise / span) ** 2 * (1 / ladder[i] ** 2 + 1 / ladder[below] ** 2)
        off = float(np.mean((slope[i] - slope[below]) ** 2))
        biases[i] = math.sqrt(max(0.0, off - rounding)) / size
        errors[i] = math.hypot(biases[i], math.sqrt(2) * noise / (span * ladder[i] * size))
    straight = np.flatnonzero((biases <= _BIAS) & (errors <= 2 * _BIAS))
    chosen = int(straight[-1]) if len(straight) else int(np.argmin(errors))
    return chosen, noise, math.sqrt(float(np.mean(slope[chosen] ** 2))), float(biases[chosen])
