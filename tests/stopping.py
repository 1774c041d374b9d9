"""A run that is stopped from within."""

from __future__ import annotations

from tunefork.train.loop import Event
from tunefork.workflows import Listener


class StopAt(Listener):
    """Interrupts a run right after a step, as Ctrl-C would, or with what nothing catches."""

    def __init__(self, step: int, by: type[BaseException] = KeyboardInterrupt) -> None:
        self.step, self.by = step, by

    def event(self, event: Event) -> None:
        if event.kind == "step" and event.step == self.step:
            raise self.by
