"""The seam between the loop and how weights change. Nothing above it knows which method it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tunefork.batch import Batch

RowLosses = Callable[[torch.nn.Module, Batch], torch.Tensor]
"""A task's loss: (model, batch) -> fp32 sums [rows]. A step's loss is sum(losses) / sum(batch.weights)."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimisation step."""

    loss: float
    forwards: int  # rows x loss evaluations
    scalars: Mapping[str, float] = field(default_factory=dict)  # grad_norm, learning_rate, projected_gradient …


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method as the registry lists it."""

    name: str
    summary: str
    paper: str
    adapters: tuple[str, ...]  # adapters it can train
    memory: str  # formula in words, for `tunefork methods`
    needs_backward: bool


class Method(Protocol):
    """Changes weights, given micro-batches and a task's loss."""

    info: MethodInfo

    def step(self, batches: Sequence[Batch], loss: RowLosses, learning_rate: float) -> StepResult:
        """One step over all rows of `batches`, which together are the step's batch."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Everything beside the weights that the next step depends on, as tensors."""
        ...

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None: ...
