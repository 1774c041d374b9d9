"""From a base and a trajectory to the trained parameters: steps done again without evaluating anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from tunefork.zo.directions.base import Term
from tunefork.zo.trajectory.format import Record


class Replayable(Protocol):
    """What steps are done again on: the engine, at some step."""

    steps: int

    def catch_up(self, records: Sequence[tuple[np.ndarray, Sequence[Term]]]) -> None:
        """Applies the next steps' terms in order, many in one visit of each tensor."""
        ...


def replay(engine: Replayable, records: Iterable[Record], *, at_once: int = 1 << 16) -> None:
    """Brings `engine` from the step it is at to the last of `records`, bit for bit as training did.

    Records of steps that it has done already are passed over; `at_once` terms are applied in one sweep.
    Raises ValueError where a record is missing in between.
    """
    waiting: list[tuple[np.ndarray, Sequence[Term]]] = []
    count, step = 0, engine.steps
    for record in records:
        if record.step < step:
            continue
        if record.step > step:
            raise ValueError(
                f"Steps must be replayed in order. Received step {record.step} after {step} finished steps."
            )
        waiting.append((record.gradients, record.terms))
        count, step = count + len(record.terms), step + 1
        if count >= at_once:
            engine.catch_up(waiting)
            waiting, count = [], 0
    if waiting:
        engine.catch_up(waiting)
