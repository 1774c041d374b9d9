"""Evaluating the loss at the points a step asks for, in as few passes through the model as can be.

A `Lane` is one side of one query over some rows of the step's batch. Where the engine owns the batch, lanes are
stacked: their rows are laid one after the other along the leading dimension and run in one pass. A row's loss must
then depend on that row alone. What cannot be stacked runs lane by lane, and `mode` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import CellType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from tunefork.zo.directions.base import Directions, Group, Pass, UnstackableError
from tunefork.zo.measured import Measured, Objective, of_answers, of_losses
from tunefork.zo.randomness import Randomness
from tunefork.zo.rows import Rows, tensors_in

LossFn = Callable[[torch.nn.Module, Any], torch.Tensor]
"""(model, batch) -> fp32 losses [rows]."""

TOKENS = {"cpu": 512}
MORE_TOKENS = 4096
"""Places (rows times positions) of a pass up to which lanes are stacked, by device: beyond, stacking saves no time."""

ONE_SIDE = "a dense direction has room for one side of one query"
LOSS_DTYPES = (torch.float32, torch.float64)
_PROOF_SCALES = (10.0, 100.0, 1000.0)  # stacking is proven with larger steps: in 16 bit, rounding hides the small ones
_PROOF_ROUNDING = 1e-5
_PROOF_CLEAR = 4.0  # how far the sides must stand apart, in what the rows of one pass are off where nothing is probed
_PROOF_SHARE = 0.2  # a side taken for the other is off by 1, one not perturbed by a half
_PROOF_EXACT, _PROOF_MOST = 1e-4, 0.05
"""Of a loss, by which a row may be off where nothing is probed: beside others, and in a pass of another size."""


class Lane(NamedTuple):
    """Rows start .. stop of the step's batch, at `sign` epsilon along the direction of `query`."""

    query: int
    sign: int
    start: int
    stop: int


def _numbers(values: torch.Tensor) -> np.ndarray:
    """fp64, one by one: where memory is only simulated, a tensor has no array but answers `item`."""
    return np.array([value.item() for value in values.detach().cpu().unbind()], dtype=np.float64)


def deal(rows: int, queries: int, split: bool) -> list[tuple[int, int]]:
    """(start, stop) of each query's rows: all of them, or its own share of consecutive ones."""
    if not split:
        return [(0, rows)] * queries
    return [(rows * j // queries, rows * (j + 1) // queries) for j in range(queries)]


class Show:
    """Tells every part of the directions how the passes that follow are perturbed."""

    def __init__(self, parts: Sequence[Directions], step: int, queries: int, epsilon: float, split: bool) -> None:
        self.parts, self.step, self.queries, self.epsilon, self.split = parts, step, queries, epsilon, split
        # no generator: what is raised while one is closed, as by Ctrl-C, is lost
        self.stackable = False not in [part.stackable for part in parts]
        self.random = Randomness()

    def __call__(self, passing: Pass | None) -> None:
        self.random.rewind()
        for part in self.parts:
            part.show(passing)

    def lane(self, query: int, sign: int, epsilon: float) -> None:
        """One side of one query for all that the next pass holds."""
        self(Pass(self.step, (Group(query, 0, 1),), 1, float(sign * epsilon)))


@dataclass(slots=True)
class Stacking:
    """What an optimizer knows about putting several lanes in one pass.

    device: where the model runs.
    limit: copies of the batch in one pass; None: as many as stay within `TOKENS`, of a closure two.
    alone: why lanes of the last step ran one by one, where they did.
    refused: why lanes of a kind of probe must, once that is known.
    passes, rows: of one micro-batch, in the last step.
    """

    device: torch.device
    limit: int | None = None
    alone: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    passes: int = 1
    rows: int = 0
    proven: set[tuple[Any, ...]] = field(default_factory=set)

    @property
    def mode(self) -> str:
        if self.alone:
            return f"side after side: {self.alone}"
        one = "both sides in one pass"
        return one if self.passes == 1 else f"side after side: {self.passes} passes of at most {self.rows} rows"

    def capacity(self, batch: Any, rows: int) -> int:
        """Rows of one pass."""
        if self.limit is not None:
            return self.limit * rows
        each = (t.shape[0] * (t.shape[1] if _has_places(t) else 1) for t in tensors_in(batch) if t.ndim)
        return rows * max(1, self.places // max(each, default=1))

    @property
    def places(self) -> int:
        """Of a pass, where the limit is not given."""
        return TOKENS.get(self.device.type, MORE_TOKENS)


def _has_places(tensor: torch.Tensor) -> bool:
    """Whether the second dimension is positions: ids and masks [rows, T], or features [rows, T, ...]."""
    return tensor.ndim > 2 or (tensor.ndim == 2 and not tensor.is_floating_point())


class Probe(Protocol):
    """A step's loss, ready to be evaluated."""

    def plain(self) -> Any:
        """One pass of a kind that the step will make, of the model as it stands."""
        ...

    def measure(self, signs: tuple[int, int], show: Show) -> Measured: ...


class BatchProbe:
    """Row losses of micro-batches which together are the step's batch; with an objective, its value instead.

    The losses then only prove that stacking works: they differ where answers may not.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: LossFn,
        batches: Sequence[Any],
        rows: Rows,
        stacking: Stacking,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.loss_fn, self.batches, self.reader, self.stacking = model, loss_fn, batches, rows, stacking
        self.counts = [rows.count(batch) for batch in batches]
        if not self.counts or min(self.counts) < 1:
            raise ValueError("A step needs rows: step_batch(loss_fn, batch). Received a step or a batch without any.")
        self.rows, self.forwards = sum(self.counts), 0
        self.objective, self.kind = objective, "batch" if objective is None else "objective"

    def plain(self) -> None:
        self._losses(self.batches[0], self.counts[0])

    def measure(self, signs: tuple[int, int], show: Show) -> Measured:
        self.stacking.alone = self._alone(show)
        shares = deal(self.rows, show.queries, show.split)
        lanes = [Lane(j, s, *dealt) for j, dealt in enumerate(shares) for s in signs if s and dealt[0] < dealt[1]]
        objective = self.objective
        if 0 in signs or (objective is not None and not objective.mean and show.split):
            lanes.insert(0, Lane(0, 0, 0, self.rows))
        found: dict[tuple[int, int], list[Any]] = {(lane.query, lane.sign): [0.0] * self.rows for lane in lanes}
        start = 0
        for batch, count in zip(self.batches, self.counts, strict=True):
            stop = start + count
            inside = [
                Lane(q, s, max(a, start) - start, min(b, stop) - start)
                for q, s, a, b in lanes
                if a < stop and b > start
            ]
            for lane, values in self._micro(batch, count, inside, show):
                found[lane.query, lane.sign][start + lane.start : start + lane.stop] = values
            start = stop

        def side(query: int, sign: int) -> list[Any]:
            if not sign:
                return found[0, 0]
            return found[query, sign] if shares[query][0] < shares[query][1] else []

        if objective is None:
            weights = _numbers(torch.cat([self.reader.weights(batch) for batch in self.batches]))
            sides, part, by_row = of_losses(side, signs, shares, weights, show.split)
        else:
            sides, part, by_row = of_answers(objective, side, signs, shares, show.split)
        here = objective.loss(found[0, 0]) if objective is not None and (0, 0) in found else None
        return Measured(sides[0], sides[1], part, self.forwards, by_row, here)

    def _alone(self, show: Show) -> str:
        if not show.stackable:
            return ONE_SIDE
        if self.objective is not None and not self.objective.stackable:
            return "the objective's answers take more than one pass"
        return self.stacking.refused.get(self.kind, "")

    def _micro(self, batch: Any, count: int, lanes: list[Lane], show: Show) -> list[tuple[Lane, list[Any]]]:
        """Each lane's losses or answers on one micro-batch."""
        if not self.stacking.alone:
            total = sum(lane.stop - lane.start for lane in lanes)
            key = (count, total, _kind_of(self.loss_fn))
            try:
                if key not in self.stacking.proven and self._proven(batch, count, lanes, show):
                    self.stacking.proven.add(key)
                return self._values(batch, count, lanes, show, self.stacking.capacity(batch, count))
            except UnstackableError as error:
                self.stacking.alone = self.stacking.refused[self.kind] = str(error)
        return self._values(batch, count, lanes, show, 0)

    def _values(
        self, batch: Any, count: int, lanes: list[Lane], show: Show, capacity: int
    ) -> list[tuple[Lane, list[Any]]]:
        if self.objective is None:
            found = self._run(batch, count, lanes, show, capacity, show.epsilon, self._losses)
            return [(lane, _numbers(losses).tolist()) for lane, losses in found]
        return self._run(batch, count, lanes, show, capacity, show.epsilon, self._answers)

    def _proven(self, batch: Any, count: int, lanes: list[Lane], show: Show) -> bool:
        """Raises UnstackableError unless the first and the last query lose in one pass what they lose alone; False
        where losses are not finite, which says nothing."""
        capacity = self.stacking.capacity(batch, count)
        if len(_plan(lanes, capacity)) == len(lanes):
            return True
        floor, _, size = self._apart(batch, count, lanes, show, capacity, 0.0)
        if not bool(torch.isfinite(size)):
            return False
        half = (count + 1) // 2  # in place of the others once more: the same pass, but for what rows see of each other
        twice = self.reader.select(batch, torch.tensor([*range(half), *range(count - half)]))
        show.lane(0, 0, 0.0)
        seen = (self._losses(twice, count) - self._losses(batch, count))[:half].abs().max()
        scale = size.clamp(min=0.1)
        if bool(seen > _PROOF_EXACT * scale) or bool(floor > _PROOF_MOST * scale):
            off = torch.maximum(floor, seen)
            raise UnstackableError(f"a row's loss depends on others: off by {off.item():.2g} of {size.item():.2g}")
        said = ""
        for scale in _PROOF_SCALES:
            off, spread, size = self._apart(batch, count, lanes, show, capacity, scale * show.epsilon)
            rounding = 2 * floor if bool(spread > _PROOF_CLEAR * floor) else 0.0
            if bool(off <= _PROOF_SHARE * spread + _PROOF_ROUNDING * size + rounding):
                return True
            said = f"in one pass losses are off by {off.item():.2g}, of {spread.item():.2g} between the sides"
        raise UnstackableError(said)

    def _apart(
        self, batch: Any, count: int, lanes: list[Lane], show: Show, capacity: int, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """By how much a row's loss in one pass differs from its loss alone, and between sides; and the largest loss."""
        together = dict(self._run(batch, count, lanes, show, capacity, epsilon, self._losses))
        some = [lane for lane in lanes if lane.query in (lanes[0].query, lanes[-1].query)]  # mixed rows show in any
        alone = dict(self._run(batch, count, some, show, 0, epsilon, self._losses))
        spread = off = size = torch.zeros((), device=self.stacking.device)
        for lane, losses in alone.items():
            size = torch.maximum(size, losses.abs().max())
            off = torch.maximum(off, (together[lane] - losses).abs().max())
            for other in alone if lane.sign else ():  # the other side, or where the model stands
                if other.query == lane.query or not other.sign:
                    apart = losses - alone[other][lane.start - other.start :][: len(losses)]
                    spread = torch.maximum(spread, apart.abs().max())
        return off, spread, size

    def _run(
        self,
        batch: Any,
        count: int,
        lanes: list[Lane],
        show: Show,
        capacity: int,
        epsilon: float,
        read: Callable[[Any, int], Any],
    ) -> list[tuple[Lane, Any]]:
        """What `read` gives for the rows of each lane."""
        found, plan = [], _plan(lanes, capacity)
        self.stacking.passes = len(plan)
        self.stacking.rows = max(sum(lane.stop - lane.start for lane in lanes) for lanes in plan)
        for together in plan:
            places = [row for lane in together for row in range(lane.start, lane.stop)]
            rows = len(places)
            part = batch if places == list(range(count)) else self.reader.select(batch, torch.tensor(places))
            if len(together) == 1:
                show.lane(together[0].query, together[0].sign, epsilon)
            else:
                show(self._pass(part, together, show.step, epsilon))
            values, begin = read(part, rows), 0
            for lane in together:
                found.append((lane, values[begin : begin + lane.stop - lane.start]))
                begin += lane.stop - lane.start
        return found

    def _pass(self, batch: Any, lanes: list[Lane], step: int, epsilon: float) -> Pass:
        entries = self.reader.entries(batch)
        groups: list[Group] = []
        scales, start, row = [], 0, 0
        for lane in lanes:
            size = lane.stop - lane.start
            places = size if entries is None else int(entries[row : row + size].sum())
            row += size
            scales.append(torch.full((places,), lane.sign * epsilon))
            if groups and groups[-1].query == lane.query:
                groups[-1] = groups[-1]._replace(stop=start + places)
            else:
                groups.append(Group(lane.query, start, start + places))
            start += places
        return Pass(step, tuple(groups), start, torch.cat(scales))

    def _losses(self, batch: Any, rows: int) -> torch.Tensor:
        losses = self.loss_fn(self.model, batch)
        self.forwards += rows
        if not isinstance(losses, torch.Tensor) or losses.shape != (rows,) or losses.dtype not in LOSS_DTYPES:
            got = f"{tuple(losses.shape)} {losses.dtype}" if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(
                f"`loss_fn` must return fp32 losses [rows], here [{rows}]: in 16 bit the difference of two losses is "
                f"rounded away. Received {got}. Try cross_entropy(logits.float(), ..., reduction='none')."
            )
        return losses

    def _answers(self, batch: Any, rows: int) -> list[Any]:
        assert self.objective is not None
        answers = list(self.objective.answers(self.model, batch))
        self.forwards += rows
        if len(answers) != rows:
            raise ValueError(f"An objective must give an answer a row, here {rows}. Received {len(answers)}.")
        return answers


def _kind_of(value: Any, depth: int = 4) -> Any:
    """What stays the same where a function is made anew for each step: its code, and what that holds on to."""
    if isinstance(value, (bool, str, type(None))):  # no number, which may be another in each step
        return value
    if not callable(value) or not depth:
        return type(value)
    if isinstance(value, partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif (code := getattr(value, "__code__", None)) is None:
        return type(value), id(value)
    else:
        function = getattr(value, "__func__", value)
        held = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # an empty one raises
        held = (*held, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        return code, *(_kind_of(each, depth - 1) for each in held)
    return tuple(_kind_of(each, depth - 1) for each in held)


def _plan(lanes: list[Lane], capacity: int) -> list[list[Lane]]:
    """Lanes by pass, each pass within `capacity` rows, or of one lane."""
    size = {lane: lane.stop - lane.start for lane in lanes}
    if sum(size.values()) > capacity:  # one side of every query, then the other: a batch in its own order is not copied
        lanes = sorted(lanes, key=lambda lane: (-lane.sign, lane.query))
    passes: list[list[Lane]] = []
    filled = 0
    for lane in lanes:
        if passes and filled + size[lane] <= capacity:
            passes[-1].append(lane)
            filled += size[lane]
        else:
            passes.append([lane])
            filled = size[lane]
    return passes
