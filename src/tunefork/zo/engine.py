"""One step, from directions to changed parameters, and what keeps it whole whatever happens in between."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from tunefork.zo.directions.base import Directions, Term
from tunefork.zo.estimators import Estimator
from tunefork.zo.measured import Measured
from tunefork.zo.probes import Probe, Show
from tunefork.zo.randomness import Randomness
from tunefork.zo.sites import trace
from tunefork.zo.updates import Updates


@dataclass(frozen=True, slots=True)
class Step:
    """What one step saw and did."""

    step: int
    loss: float  # mean of the two sides, or of the middle where that is evaluated
    gradients: np.ndarray  # fp32 [queries]: projected gradients, times queries times their share of the weight
    terms: Sequence[Term]
    forwards: int  # rows (of a closure: batches) times evaluations


class Log(Protocol):
    """Where finished steps are written."""

    def append(self, loss: float, gradients: np.ndarray, terms: Sequence[Term]) -> None: ...


class Engine:
    """Parameters as learned after `steps` steps, and the way to the next one."""

    def __init__(
        self,
        model: torch.nn.Module,
        parts: Sequence[Directions],
        estimator: Estimator,
        updates: Updates,
        *,
        queries: int,
        split: bool,
        log: Log | None = None,
    ) -> None:
        self.model, self.parts, self.estimator, self.updates = model, list(parts), estimator, updates
        self.queries, self.split, self.log = queries, split, log
        self.steps, self.bound = 0, False
        self.in_training: list[torch.nn.Module] = []
        self.modules = tuple(model.modules())
        self.attach()

    def step(self, probe: Probe, *, lr: float, epsilon: float, weight_decay: float = 0.0) -> Step:
        """One step; on any exception the parameters are those of the last finished one.

        Raises FloatingPointError for a loss that is not finite.
        """
        with Uninterrupted() as signals:
            measured = self.measure(probe, signals, self.estimator.signs, self.steps, epsilon)
            slopes = self.estimator.slopes(measured.first, measured.second, epsilon)
            here = measured.second if 0 in self.estimator.signs else (measured.first + measured.second) / 2
            if not np.isfinite(slopes).all():
                raise FloatingPointError(
                    f"The losses of both sides must be finite. Received {measured.first} and {measured.second} in step "
                    f"{self.steps}. Try a smaller lr than {lr:g}, or a smaller epsilon than {epsilon:g}."
                )
            loss = np.sum(measured.shares * here) if measured.here is None else measured.here
            loss = float(np.float32(loss))  # as the log holds it
            gradients = (slopes * (measured.shares * self.queries)).astype(np.float32)
            moving = lr if gradients.any() else 0.0  # where all sides tie nothing is known, and nothing changes
            terms = self.updates.next(gradients).terms(self.steps, moving, weight_decay)
            if not all(math.isfinite(number) for term in terms for number in (term.coefficient, term.decay)):
                raise FloatingPointError(
                    f"What a step adds must be finite in fp32. Received slopes of up to {np.abs(slopes).max():.3g} in "
                    f"step {self.steps}. Try a smaller lr than {lr:g}."
                )
            if self.log is not None:
                self.log.append(loss, gradients, terms)  # first, so that no change is ever without its record
            self.catch_up([(gradients, terms)])
            return Step(self.steps - 1, loss, gradients, terms, measured.forwards)

    def measure(
        self, probe: Probe, signals: Uninterrupted, signs: tuple[int, int], step: int, epsilon: float
    ) -> Measured:
        """The losses on two sides; the model is as learned before and after, and in its own mode."""
        try:
            with torch.no_grad():
                self._rest_dropout()
                self._bind(probe, signals)
                for part in self.parts:
                    part.draw(step, self.queries)
                with signals.allowed:
                    return probe.measure(signs, Show(self.parts, step, self.queries, epsilon, self.split))
        finally:
            for part in self.parts:
                part.show(None)
            while self.in_training:
                self.in_training[-1].training = True
                self.in_training.pop()

    def catch_up(self, records: Sequence[tuple[np.ndarray, Sequence[Term]]]) -> None:
        """Applies finished steps, just made or read from a trajectory, in one sweep."""
        updates = self.updates
        for gradients, _ in records:
            updates = updates.next(gradients)
        together = [term for _, terms in records for term in terms]
        with Uninterrupted(), torch.no_grad():
            for part in self.parts:
                part.apply(together)
            self.updates, self.steps = updates, self.steps + len(records)

    def attach(self) -> None:
        for part in self.parts:
            part.attach()

    def detach(self) -> None:
        for part in self.parts:
            part.detach()
        self.bound = False

    def _rest_dropout(self) -> None:
        for module in self.modules:
            if module.training:
                self.in_training.append(module)
                module.training = False

    def _bind(self, probe: Probe, signals: Uninterrupted) -> None:
        """Before the first pass: sees where the parameters are used, and attaches the directions there."""
        self.attach()
        if self.bound:
            return
        random = Randomness()

        def look() -> None:
            with signals.allowed:
                probe.plain()

        try:
            uses = trace(self.model, look)
            for part in self.parts:
                part.bind(uses)
            self.bound = True
        finally:
            random.rewind()
            if not self.bound:
                self.detach()
                self.attach()


class Uninterrupted:
    """Signals that Python code handles (Ctrl-C, a handler of the caller's) wait for the end, but where `allowed`.

    Only the main thread gets signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.waiting: list[int] = []
        self.open = False
        self.allowed = _Allowed(self)

    def __enter__(self) -> Uninterrupted:
        if threading.current_thread() is threading.main_thread():
            try:
                for number in _SIGNALS:
                    handler = signal.getsignal(number)
                    if callable(handler):
                        self.handlers[number] = handler
                        signal.signal(number, self._arrived)
            except BaseException:
                self._restore()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        for number in self.waiting:
            signal.raise_signal(number)

    def _arrived(self, number: int, frame: Any) -> None:
        if not self.open:
            self.waiting.append(number)
            return
        self.open = False  # what the handler raises must not be interrupted on its way out
        self.handlers[number](number, frame)
        self.open = True

    def _restore(self) -> None:
        while self.handlers:
            number, handler = next(reversed(self.handlers.items()))  # Ctrl-C last
            signal.signal(number, handler)
            del self.handlers[number]


class _Allowed:
    """Where signals act at once."""

    def __init__(self, signals: Uninterrupted) -> None:
        self.signals = signals

    def __enter__(self) -> None:
        self.signals.open = True

    def __exit__(self, *_: object) -> None:
        self.signals.open = False


_SIGNALS = [signal.SIGINT] + [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2") if name in dir(signal)
]
