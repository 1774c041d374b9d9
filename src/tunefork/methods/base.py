"""The seam between the loop and how weights change. Nothing above it knows which method it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tunefork.batch import Batch
from tunefork.recipe.resolve import UsualBatch
from tunefork.zo import Objective

RowLosses = Callable[[torch.nn.Module, Batch], torch.Tensor]
"""A task's loss: (model, batch) -> fp32 sums [rows]. A step's loss is sum(losses) / sum(batch.weights)."""

__all__ = ["Method", "MethodInfo", "Objective", "RowLosses", "StepResult", "UsualBatch"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimisation step."""

    loss: float
    forwards: int  # rows x loss evaluations
    scalars: Mapping[str, float] = field(default_factory=dict)  # grad_norm, learning_rate, projected_gradient …
    notes: tuple[str, ...] = ()  # what a person should know: a calibration's choice and why


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method as the registry lists it."""

    name: str
    summary: str
    paper: str
    adapters: tuple[str, ...]  # adapters it can train
    memory: str  # formula in words, for `tunefork methods`
    needs_backward: bool
    kernel_bytes: int = 0  # what its kernels take on a CPU, once they are loaded


class Method(Protocol):
    """Changes weights, given micro-batches and a task's loss."""

    info: MethodInfo

    def step(self, batches: Sequence[Batch], loss: RowLosses, learning_rate: float) -> StepResult:
        """One step over all rows of `batches`, which together are the step's batch.

        learning_rate: of this step; where the recipe has none, the share of the method's own that the schedule leaves.
        """
        ...

    def learned(self) -> dict[str, torch.Tensor]:
        """What training has changed so far, as copies: with the loaded model, all that makes the trained one."""
        ...

    def load_learned(self, learned: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `learned` returned, bit for bit. Raises RunError, changing nothing, where it does not fit."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Everything beside what was learned that the next step depends on, as tensors."""
        ...

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None: ...

    def finish(self) -> torch.nn.Module:
        """The trained model, free of the method: every trained weight requires a gradient, as `save_artefact` asks."""
        ...
