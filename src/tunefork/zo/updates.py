"""From projected gradients to the final fp32 coefficient on each direction.

Everything here is a function of the projected gradients that the trajectory holds, so a run is resumed by reading them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tunefork.zo.directions.base import Term

NORMALISERS = ("none", "rms", "std")

_TINY = 1e-12
_LEAST_SPREAD = 0.1  # of a step's slopes, in their root mean square: where they tie, it says nothing of their size
_SMALLEST = 0.02  # a direction in the momentum window is dropped below this share of its first weight


@dataclass(frozen=True, slots=True)
class Rule:
    """How a step's size follows from its projected gradients g, one a query.

    normaliser: `none`; `rms`, g over the root of its running mean square (for dense Rademacher with one query this is
        Adam's second moment, since z^2 = 1); `std`, g over the standard deviation of the step's own (FZOO,
        arXiv 2506.09034), or a tenth of their root mean square if that is more.
    clip, clip_rms: bounds on |g|, absolute and in running root mean squares.
    momentum: heavy ball; the past directions are drawn again instead of a buffer kept.
    """

    normaliser: str = "none"
    beta: float = 0.99
    momentum: float = 0.0
    clip: float | None = None
    clip_rms: float | None = None

    @property
    def window(self) -> int:
        """Steps whose directions an update contains."""
        return 1 if self.momentum == 0.0 else 1 + int(math.log(_SMALLEST) / math.log(self.momentum))


class Updates:
    """The running state of a `Rule`: a mean square and a window of past steps."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.steps, self.mean_square = 0, 0.0
        self.past: deque[np.ndarray] = deque(maxlen=rule.window)  # newest first

    def next(self, gradients: np.ndarray) -> Updates:
        """The state with one more step's projected gradients [queries] fp32; this one stays as it is."""
        after = Updates(self.rule)
        g = gradients.astype(np.float64)
        rule, after.steps = self.rule, self.steps + 1
        if rule.clip is not None:
            g = np.clip(g, -rule.clip, rule.clip)
        if rule.clip_rms is not None and self.mean_square:
            bound = rule.clip_rms * math.sqrt(self._mean_square())
            g = np.clip(g, -bound, bound)
        after.mean_square = rule.beta * self.mean_square + (1.0 - rule.beta) * float(np.mean(g * g))
        if rule.normaliser == "rms":
            g = g / (math.sqrt(after._mean_square()) + _TINY)
        elif rule.normaliser == "std":
            g = g / (max(float(np.std(g)), _LEAST_SPREAD * math.sqrt(float(np.mean(g * g)))) + _TINY)
        after.past.extend([g, *self.past][: rule.window])
        return after

    def _mean_square(self) -> float:
        return self.mean_square / (1.0 - self.rule.beta**self.steps) if self.rule.beta < 1.0 else self.mean_square

    def state(self) -> dict[str, torch.Tensor]:
        """fp64: the mean square, and the window's values [steps, queries]."""
        past = np.array(self.past) if self.past else np.zeros((0, 1))
        return {"mean_square": torch.tensor(self.mean_square, dtype=torch.float64), "past": torch.from_numpy(past)}

    def load_state(self, steps: int, state: Mapping[str, torch.Tensor]) -> None:
        self.steps, self.mean_square = steps, float(state["mean_square"])
        self.past.clear()
        self.past.extend(state["past"].double().cpu().numpy())

    def terms(self, step: int, lr: float, weight_decay: float) -> list[Term]:
        """What step `step` adds: -lr / queries times g, and lr * momentum^age for the steps before it."""
        decay = float(np.float32(1.0 - lr * weight_decay))
        found: list[Term] = []
        for age, g in enumerate(self.past):
            for query, value in enumerate(g):
                c = float(np.float32(-lr * self.rule.momentum**age * value / len(g)))
                found.append(Term(step - age, query, c, 1.0 if found else decay))
        return found
