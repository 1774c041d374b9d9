"""From losses at a few points along a direction to its projected gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimator:
    """Where the loss is evaluated along each direction, in units of epsilon, and how that gives a slope."""

    name: str
    signs: tuple[int, int]  # 0 is where the model stands; that side is shared by all queries
    span: int  # distance of the two, in epsilon

    def forwards(self, queries: int) -> int:
        """Passes of the batch a step when every query sees all of it."""
        return queries + 1 if 0 in self.signs else 2 * queries

    def slopes(self, first: np.ndarray, second: np.ndarray, epsilon: float) -> np.ndarray:
        """fp32 [queries]: (L(first sign) - L(second sign)) / (span epsilon), from fp64 losses."""
        return ((first - second) / (self.span * epsilon)).astype(np.float32)


TWO_SIDED = Estimator("two_sided", (1, -1), 2)
"""SPSA (Spall 1992), (L+ - L-) / (2 epsilon): the curvature cancels."""

ONE_SIDED = Estimator("one_sided", (1, 0), 1)
"""(L+ - L0) / epsilon: nearly half the passes for many queries, with the curvature's bias."""

ESTIMATORS = {e.name: e for e in (TWO_SIDED, ONE_SIDED)}
