"""Epsilon and a first learning rate for this model and task, measured along a few random directions.

Along each direction z the loss is read at the middle and on both sides for a ladder of epsilons. A slope that is off
from the one at the next smaller epsilon shows curvature's change (bias), one that is off at the small end shows
rounding (noise). The largest epsilon that is in the straight part, and above the noise, is taken.

The second difference is z^T H z. A step of c z changes the loss by c s + c^2 z^T H z / 2, so with q queries of slope g,
measured on rows that are only a sample, the best step has lr = q E[g s] / (E[g^2] z^T H z). E[g s], the part of the
slope that the rows agree on, is measured from the rows' own slopes. A quarter of that lr is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tunefork.zo.engine import Engine, Uninterrupted
from tunefork.zo.measured import Measured
from tunefork.zo.probes import Probe
from tunefork.zo.updates import Rule

LADDER = tuple(10.0 ** (k / 2) for k in range(-8, -1))
"""Epsilons tried: half decades from 1e-4 to 0.1."""

_BIAS = 0.1  # share of the slope by which an epsilon may be off
_CAUTION = 0.25  # of the best step's length: directions add up, and curvature grows on the way
SHARE = (0.02, 1.0)  # bounds of the measured part of a slope's square that the rows agree on
_UNKNOWN_SHARE = 0.25  # the same, where rows cannot be told apart
LAST = 2**32 - 1  # steps whose directions no run reaches


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured and chosen, and a sentence that says why."""

    epsilon: float
    lr: float
    slope: float  # root mean square of the projected gradients
    curvature: float  # root mean square of z^T H z
    noise: float  # standard deviation of one loss from rounding; not asked of a metric
    share: float  # part of the slopes' square that the rows agree on
    forwards: int
    reason: str


def calibrate(engine: Engine, make_probe: Callable[[], Probe], rule: Rule, *, directions: int = 6) -> Calibration:
    """Chooses epsilon and lr for a loss; the model is left as it is. Raises FloatingPointError where none is finite."""
    slopes, bends, shares, forwards = [], [], [], 0
    for i in range(max(2, -(-directions // engine.queries))):
        found = _along(engine, make_probe, LAST - i)
        slopes.append(found[0])
        bends.append(found[1])
        shares += found[2]
        forwards += found[3]
    slope, bend = np.concatenate(slopes, axis=1), np.concatenate(bends, axis=1)  # [epsilons, directions]
    ladder = np.array(LADDER)
    usable: np.ndarray = np.asarray(np.isfinite(slope).all(axis=1) & np.isfinite(bend).all(axis=1))
    if not usable.any():
        raise FloatingPointError("The loss must be finite near the weights. Received none that is, at any epsilon.")
    chosen, noise, size, bias = _epsilon(ladder, slope, bend, usable)
    # the root mean square: the mean itself where directions agree, and no small number where their signs cancel
    curvature = math.sqrt(float(np.mean(bend[chosen] ** 2)))
    squares = float(np.mean(slope[chosen] ** 2))
    pairs = [pair for by_epsilon in shares if (pair := by_epsilon[chosen]) is not None]
    share = float(np.clip(np.mean(pairs) / max(squares, 1e-30), *SHARE)) if pairs else _UNKNOWN_SHARE
    lr = suited_lr(engine.queries, share, curvature, rule, [s[chosen] for s in slopes])
    epsilon = float(f"{ladder[chosen]:.2g}")
    reason = (
        f"epsilon {epsilon:g} is the largest at which slopes are straight (off by {bias:.0%} from the next smaller; "
        f"rounding moves a loss by {noise:.1g}, a probe by {size * epsilon:.1g}). lr {lr:g} is a quarter of what suits "
        f"a curvature of {curvature:.3g} along a direction, {engine.queries} queries, and slopes of {size:.3g} of "
        f"whose square {share:.0%} is {'what the rows agree on' if pairs else 'taken to be more than chance'}."
    )
    return Calibration(epsilon, lr, size, curvature, noise, share, forwards, reason)


def suited_lr(queries: int, share: float, curvature: float, rule: Rule, slopes: Sequence[np.ndarray]) -> float:
    """To two digits, for a rule that is given slopes [queries] like those of these steps."""
    lr = _CAUTION * queries * share / max(curvature, 1e-30)
    if rule.normaliser == "rms":
        lr *= math.sqrt(float(np.mean(np.concatenate(slopes) ** 2)))
    elif rule.normaliser == "std":
        lr *= float(np.mean([np.std(s) for s in slopes]))
    lr /= sum(rule.momentum**age for age in range(rule.window))
    return float(f"{lr:.2g}")


def _along(
    engine: Engine, make_probe: Callable[[], Probe], step: int
) -> tuple[np.ndarray, np.ndarray, list[list[float | None]], int]:
    """Slopes and second differences [epsilons, queries] along one step's directions, what rows agree on, forwards."""
    measured: list[Measured] = []
    with Uninterrupted() as signals:
        for signs, epsilon in [((0, 0), LADDER[0]), *(((1, -1), e) for e in LADDER)]:
            measured.append(engine.measure(make_probe(), signals, signs, step, epsilon))
    middle = measured[0].first
    slope = np.stack([(m.first - m.second) / (2 * e) for m, e in zip(measured[1:], LADDER, strict=True)])
    bend = np.stack([(m.first + m.second - 2 * middle) / e**2 for m, e in zip(measured[1:], LADDER, strict=True)])
    shares = [
        [agreed(m.by_row(j), e) for m, e in zip(measured[1:], LADDER, strict=True)] for j in range(engine.queries)
    ]
    return slope, bend, shares, sum(m.forwards for m in measured)


def agreed(differences: np.ndarray, epsilon: float) -> float | None:
    """Mean product of two different rows' slopes: unbiased for the square of the slope that all rows share."""
    slopes = differences / (2 * epsilon)
    m = len(slopes)
    return float((slopes.sum() ** 2 - (slopes**2).sum()) / (m * (m - 1))) if m > 1 else None


def _epsilon(
    ladder: np.ndarray, slope: np.ndarray, bend: np.ndarray, usable: np.ndarray
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
        rounding = noise**2 / 2 * (1 / ladder[i] ** 2 + 1 / ladder[below] ** 2)
        off = float(np.mean((slope[i] - slope[below]) ** 2))
        biases[i] = math.sqrt(max(0.0, off - rounding)) / size
        errors[i] = math.hypot(biases[i], noise / (math.sqrt(2) * ladder[i] * size))
    straight = np.flatnonzero((biases <= _BIAS) & (errors <= 2 * _BIAS))
    chosen = int(straight[-1]) if len(straight) else int(np.argmin(errors))
    return chosen, noise, math.sqrt(float(np.mean(slope[chosen] ** 2))), float(biases[chosen])
