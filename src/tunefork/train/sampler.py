"""Which rows a step sees: a pure function of (seed, step), so that a resumed run needs no sampler state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Sampler:
    """Rows 0..n-1 in a fresh seeded order every epoch; the last batch of an epoch may be smaller."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = -(-rows // batch_size)
        self._epoch = -1
        self._order = np.arange(0)

    def step(self, step: int) -> list[int]:
        """Indices of the rows of step `step`, counted from 0."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.rows)
            self._epoch = epoch
        return self._order[at * self.batch_size : (at + 1) * self.batch_size].tolist()


def micro_batches(indices: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """A step's rows in groups of at most `size`, similar lengths together, so that little is padded."""
    ordered = sorted(indices, key=lambda i: (lengths[i], i))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
