"""Which rows a step sees: a pure function of (seed, step), so that a resumed run needs no sampler state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunefork.recipe.schema import TrainSection
from tunefork.render import Rendered


class Sampler:
    """Rows 0..n-1 in a fresh seeded order every epoch; without labels the last batch of an epoch may be smaller.

    labels: one a row. With them batches are stratified: each is a systematic sample of the rows in the order of their
        labels, so it has these in the proportions of all as nearly as it can, and no two differ by more than a row.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, labels: Sequence[int] | None = None) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = -(-rows // batch_size)
        self._labels = None if labels is None else np.asarray(labels)
        self._epoch = -1
        self._batches: list[np.ndarray] = []

    def step(self, step: int) -> list[int]:
        """Indices of the rows of step `step`, counted from 0."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            chance, steps = np.random.Generator(np.random.PCG64([self.seed, epoch])), self.steps_per_epoch
            order = chance.permutation(self.rows)
            if self._labels is None:
                self._batches = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(steps)]
            else:
                order = order[np.argsort(self._labels[order], kind="stable")]
                self._batches = [order[first::steps] for first in chance.permutation(steps)]
            self._epoch = epoch
        return self._batches[at].tolist()


def sampler_of(rows: Sequence[Rendered], options: TrainSection, seed: int) -> Sampler:
    """That of a resolved recipe's training."""
    labels = [-1 if r.example.gold is None else r.example.gold for r in rows]
    return Sampler(len(rows), int(options.batch_size), seed, labels if options.sampling == "stratified" else None)


def micro_batches(indices: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """A step's rows in groups of at most `size`, similar lengths together, so that little is padded."""
    ordered = sorted(indices, key=lambda i: (lengths[i], i))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
