"""Back-propagation with AdamW: the gradient of the whole batch, whatever way it is cut into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tunefork.batch import Batch
from tunefork.errors import RecipeError, TrainingError
from tunefork.methods.base import MethodInfo, Objective, RowLosses, StepResult, UsualBatch
from tunefork.models import load_trainable_state, trainable_state
from tunefork.recipe.schema import Recipe, ZoSection

INFO = MethodInfo(
    name="backprop",
    summary="Back-propagation with AdamW over full weights or any adapter.",
    paper="Loshchilov & Hutter 2019, arXiv 1711.05101",
    adapters=("none", "lora", "qlora", "dora", "prefix", "head"),
    memory="weights + activations of one micro-batch + 12 bytes a trained parameter (gradient and two fp32 moments)",
    needs_backward=True,
)

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_SCALE, _GROW_AFTER = 2.0**14, 200


def usual_batch(recipe: Recipe, mean: bool) -> UsualBatch:
    return UsualBatch()


def learns_beside(recipe: Recipe) -> tuple[str, ...]:
    return ()


def check_settings(recipe: Recipe) -> None:
    """Raises RecipeError for settings of the method zo."""
    if recipe.zo.objective != ZoSection().objective:
        raise RecipeError(
            f"Back-propagation needs a gradient, and `zo.objective` {recipe.zo.objective} has none. Received method "
            "backprop. Try --method zo."
        )
    if recipe.zo != ZoSection():
        set_here = next(k for k in ZoSection.model_fields if getattr(recipe.zo, k) != getattr(ZoSection(), k))
        raise RecipeError(
            f"`zo.{set_here}` is read by the method zo. Received method {recipe.train.method}. Try --method zo, or "
            "leaving it out."
        )


def make(
    model: torch.nn.Module,
    recipe: Recipe,
    trajectory: Path | None,
    about: Mapping[str, Any] | None,
    objective: Objective | None,
) -> Backprop:
    return Backprop(model, recipe.train, autocast=_DTYPES[recipe.model.dtype])


class Backprop:
    """AdamW with decoupled weight decay on matrices, clipping, and a loss scale where the model computes in fp16.

    Parameters are fp32 whatever the model computes in (`autocast` is its number format, or None for fp32),
    so that no update is rounded away.
    """

    info = INFO

    def __init__(self, model: torch.nn.Module, options: Any, *, autocast: torch.dtype | None) -> None:
        self.model, self.options, self.autocast = model, options, autocast
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.device_type = self.parameters[0].device.type
        decayed = [p for p in self.parameters if p.ndim >= 2]
        plain = [p for p in self.parameters if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": options.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.adam_epsilon,
        )
        self.scaled = autocast is torch.float16
        self.scale, self.good_steps = (_FIRST_SCALE if self.scaled else 1.0), 0

    def step(self, batches: Sequence[Batch], loss: RowLosses, learning_rate: float) -> StepResult:
        """One AdamW step on sum(row losses) / sum(row weights) over all of `batches`."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        weight = float(sum(b.weights.sum().item() for b in batches))
        total = 0.0
        for batch in batches:
            with torch.autocast(self.device_type, dtype=self.autocast, enabled=self.autocast is not None):
                part = loss(self.model, batch).sum() / weight
            (part * self.scale).backward()
            total += part.item()
        norm = self._finish()
        if not math.isfinite(total) or (not math.isfinite(norm) and not self.scaled):
            raise TrainingError(
                f"The loss and its gradient must stay finite. Received loss {total}, gradient norm {norm}. "
                f"Try a smaller learning rate than {learning_rate:g}, or --dtype fp32."
            )
        rows = sum(b.rows for b in batches)
        return StepResult(total, rows, {"gradient_norm": norm, "learning_rate": learning_rate})

    def _finish(self) -> float:
        """Unscales, clips and applies the gradient; an fp16 overflow halves the scale and skips the step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaled:
            for gradient in gradients:
                gradient.mul_(1.0 / self.scale)
        limit = self.options.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit if limit is not None else math.inf))
        if math.isfinite(norm):
            self.optimizer.step()
            self.good_steps += 1
            if self.scaled and self.good_steps >= _GROW_AFTER:
                self.scale, self.good_steps = self.scale * 2, 0
        elif self.scaled:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def learned(self) -> dict[str, torch.Tensor]:
        return trainable_state(self.model)

    def load_learned(self, learned: Mapping[str, torch.Tensor]) -> None:
        load_trainable_state(self.model, learned)

    def finish(self) -> torch.nn.Module:
        return self.model

    def state(self) -> dict[str, torch.Tensor]:
        """AdamW's moments and step counts by parameter name, and the loss scale."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = value.detach().clone()
        state["loss_scale"] = torch.tensor([self.scale, float(self.good_steps)], dtype=torch.float64)
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state` returned, bit for bit."""
        by_name = dict(zip(self.names, self.parameters, strict=True))
        self.scale, self.good_steps = float(state["loss_scale"][0]), int(state["loss_scale"][1])
        for key, value in state.items():
            kind, slash, name = key.partition("/")
            if slash:
                place = torch.device("cpu") if kind == "step" else by_name[name].device
                self.optimizer.state[by_name[name]][kind] = value.detach().clone().to(place)
