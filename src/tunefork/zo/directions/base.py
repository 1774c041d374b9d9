"""What the engine asks of a kind of direction, and what it tells it about a pass through the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from tunefork.zo.sites import Site, Uses


class UnstackableError(RuntimeError):
    """A module's input does not divide into the rows of a stacked pass."""


def warn_unused(names: Sequence[str]) -> None:
    """Says which parameters a step cannot change, as its loss does not depend on them."""
    if names:
        warnings.warn(
            f"{len(names)} parameters were not read in the first pass and only change once they are: "
            f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}.",
            stacklevel=2,
        )


class Hook:
    """A module's hook that is left behind, doing nothing, where the model is copied or pickled: what was learned stays
    with the optimizer, so that a copy is of the base."""

    def __init__(self, run: Callable[..., Any] | None = None) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return None if self.run is None else self.run(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.run is not None:
            warnings.warn(
                "A copy of a model under ZO is of its base: what is learned lies beside it, but for dense directions. "
                "Try learned() and load_learned() to keep a state, or finish() to keep the end.",
                stacklevel=3,
            )
        return Hook, ()


class Term(NamedTuple):
    """The learned change times `decay`, then plus `coefficient` times the direction z(step, query); both are fp32."""

    step: int
    query: int
    coefficient: float
    decay: float = 1.0


class Group(NamedTuple):
    """Entries start .. stop of the leading dimension, which see the direction of one query."""

    query: int
    start: int
    stop: int


@dataclass(slots=True)
class Pass:
    """How one pass through the model is perturbed: entry i of the leading dimension sees W + scale[i] * z(query).

    `scale` is one number (one side of one query), or a tensor [entries]. In a pass that `torch.func.vmap` maps over
    sides (`mapped`) it is a tensor [groups], and all entries see the directions of all groups, each times its own.
    """

    step: int
    groups: tuple[Group, ...]
    entries: int
    scale: float | torch.Tensor
    mapped: bool = False
    _columns: dict[Any, torch.Tensor] = field(default_factory=dict)

    def parts(self, device: torch.device) -> torch.Tensor:
        """int64 [parts]: the query of each of the equal parts that the entries divide into, as few as can be."""
        size = math.gcd(*(group.stop - group.start for group in self.groups))
        queries = [group.query for group in self.groups for _ in range((group.stop - group.start) // size)]
        return torch.tensor(queries, device=device)

    def scaled(self, places: int, factor: float, like: torch.Tensor, name: str) -> Any:
        """`scale` times `factor`; where it differs by entry, as [places, 1] for a leading dimension of `places`.

        Raises UnstackableError where the places do not divide into the entries.
        """
        if isinstance(self.scale, float):
            return self.scale * factor
        key = (places, factor, like.dtype, like.device)
        if key not in self._columns:
            if places % self.entries:
                raise UnstackableError(f"{name} sees {places} places for {self.entries} rows")
            scale = torch.as_tensor(self.scale).mul(factor).repeat_interleave(places // self.entries)
            self._columns[key] = scale[:, None].to(like)
        return self._columns[key]


class Directions(Protocol):
    """One kind of direction over some of the model's parameters."""

    stackable: bool
    """Whether one pass may hold several sides and queries."""

    @property
    def sites(self) -> Sequence[Site]:
        """The parameters it moves."""
        ...

    def attach(self) -> None:
        """Shows what is learned in the model's outputs, where that is not in its weights and not shown yet."""
        ...

    def bind(self, uses: Uses) -> None:
        """Gets ready to perturb parameters where they are used; refuses by name what it cannot reach."""
        ...

    def detach(self) -> None:
        """Takes every hook off the model again."""
        ...

    def draw(self, step: int, queries: int) -> None:
        """Makes the directions z(step, 0 .. queries) ready."""
        ...

    def show(self, passing: Pass | None) -> None:
        """Perturbs the passes that follow; None leaves the model as learned so far."""
        ...

    def apply(self, terms: Sequence[Term]) -> None:
        """The terms in order, each rounded before the next. Nothing here may fail once it has begun."""
        ...

    def state(self, *, weights: bool = True) -> dict[str, torch.Tensor]:
        """What was learned, as tensors that are not copied; `weights`: with those that the model itself holds."""
        ...

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies what `state` gave, whose names and shapes have been checked."""
        ...

    def values(self) -> Iterator[tuple[Site, torch.Tensor]]:
        """Each parameter with its learned value, in fp32 or fp64. Raises ValueError by name where it has none."""
        ...
