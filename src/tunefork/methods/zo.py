"""Zeroth-order fine-tuning: the engine of `tunefork.zo` behind the loop's seam."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tunefork.batch import Batch
from tunefork.errors import MissingFileError, RecipeError, RunError, TrainingError, UnsupportedError
from tunefork.methods.base import MethodInfo, Objective, RowLosses, StepResult, UsualBatch
from tunefork.models import add_factors, autocast, load_trainable_state, trainable_state
from tunefork.recipe.schema import Recipe, TrainSection, ZoSection
from tunefork.zo import ZO, Calibration, Reader, TrajectoryError
from tunefork.zo.calibrate import BATCHES
from tunefork.zo.estimators import ESTIMATORS
from tunefork.zo.kernels import have_numba
from tunefork.zo.options import options_of, preset_of

INFO = MethodInfo(
    name="zo",
    summary="Zeroth-order: passes forward only, in the memory it takes to run the model.",
    paper="Malladi et al. 2023 (MeZO), arXiv 2305.17333, and successors",
    adapters=("none", "lora", "qlora", "prefix", "head"),
    memory="weights as stored + activations of one forward pass + 4 x max_rank bytes an output of each matrix",
    needs_backward=False,
    kernel_bytes=43 * 2**20 if have_numba() else 0,
)

_LOSS = ZoSection().objective  # no metric
_AXES = ("direction", "rank", "max_rank", "estimator", "queries", "rows", "normaliser", "momentum", "clip_rms")
_UNREAD = ("betas", "adam_epsilon", "max_grad_norm")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CALIBRATE_EVERY = 128  # steps, after those of the first batches
_MEASURED = tuple(field.name for field in fields(Calibration) if field.name != "reason")


def check_settings(recipe: Recipe) -> None:
    """Raises RecipeError for settings that this method does not read, and for choices that do not go together."""
    adapter = str(recipe.adapter.name)
    if adapter not in (*INFO.adapters, "auto"):
        raise UnsupportedError(
            f"The method zo trains adapters {', '.join(INFO.adapters)}. Received {adapter}. Try --adapter lora."
        )
    defaults = TrainSection()
    for name in _UNREAD:
        if getattr(recipe.train, name) != getattr(defaults, name):
            raise RecipeError(f"`train.{name}` is read by the method backprop. Received method zo. Try leaving it out.")
    if recipe.train.activation_checkpointing is True:
        raise RecipeError(
            "`train.activation_checkpointing` saves memory in a backward pass, and the method zo has none. Received "
            "true. Try leaving it out."
        )
    try:
        options = options_of(recipe.zo.preset, _changes(recipe.zo, adapter))
    except ValueError as error:
        raise RecipeError(f"zo: {error}") from None
    for name in ("rank", "max_rank") if options.direction != "low_rank" else ():
        if getattr(recipe.zo, name) is not None:
            raise RecipeError(
                f"`zo.{name}` is read where directions are low_rank. Received {options.direction} ones (preset "
                f"{recipe.zo.preset}, adapter {adapter}). Try leaving it out."
            )
    if recipe.zo.rows == "split" and options.queries == 1:
        raise RecipeError("`zo.rows=split` shares rows among queries. Received one query. Try zo.queries=8 as well.")


def usual_batch(recipe: Recipe, mean: bool) -> UsualBatch:
    """`mean`: the objective is a mean over rows."""
    preset, usual = preset_of(recipe.zo.preset), UsualBatch()
    options = options_of(preset.name, _changes(recipe.zo, str(recipe.adapter.name)))
    evaluations = ESTIMATORS[options.estimator].forwards(options.queries if options.rows == "shared" else 1)
    if not mean:
        evaluations += options.rows == "split" and options.estimator == "two_sided"  # where the model stands
        return UsualBatch(64, "of few rows the objective says little", preset.sampling, evaluations)
    rows = preset.batch if recipe.zo.objective == _LOSS else usual.rows
    why = "" if rows >= usual.rows else "rows differ less from each other than directions do, so few see many"
    return UsualBatch(rows, why, preset.sampling, evaluations)


def learns_beside(recipe: Recipe) -> tuple[str, ...]:
    """Dense directions change weights, and NF4 ones cannot be changed: over those they train an adapter."""
    low_rank = options_of(recipe.zo.preset, _changes(recipe.zo, "qlora")).direction == "low_rank"
    return ("none", "qlora") if low_rank else ("none",)


def make(
    model: torch.nn.Module,
    recipe: Recipe,
    trajectory: Path | None,
    about: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
) -> ZerothOrder:
    """`trajectory` logs the run and keeps what `model` has that its base has not: all that requires a gradient."""
    section, adapter = recipe.zo, str(recipe.adapter.name)
    changes = _changes(section, adapter)
    if adapter == "none" and options_of(section.preset, changes).direction != "low_rank":
        changes["train"] = ["*"]
    known = recipe.model_dump(mode="json", exclude={"out"}, exclude_defaults=True)
    try:
        optimizer = ZO(
            model,
            section.preset,
            lr=None if recipe.train.learning_rate is None else float(recipe.train.learning_rate),
            epsilon=section.epsilon,
            seed=recipe.seed,
            trajectory=trajectory,
            run={"recipe": sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()},
            start=None if trajectory is None else trainable_state(model),
            about=about,
            weight_decay=recipe.train.weight_decay,
            **changes,
        )
    except TrajectoryError as error:
        raise RunError(str(error)) from None
    except ValueError as error:
        raise RecipeError(f"zo: {error}") from None
    return ZerothOrder(model, recipe, optimizer, objective)


def rebuild(
    model: torch.nn.Module,
    recipe: Recipe,
    trajectory: Reader,
    step: int | None = None,
    learned: Mapping[str, torch.Tensor] | None = None,
) -> torch.nn.Module:
    """The trained model after `step` steps of a trajectory (None: all), from its base with what `put_start` puts there.

    `learned`: a checkpoint's, of a step up to that one. Raises RunError where the trajectory is another model's.
    """
    try:
        optimizer = ZO.from_trajectory(model, trajectory, step, learned)
    except ValueError as error:
        raise RunError(str(error)) from None
    return ZerothOrder(model, recipe, optimizer).finish()


def open_trajectory(path: Path) -> Reader:
    """A trajectory to read. Raises MissingFileError or RunError for a file that is none, or damaged."""
    if not path.is_file():
        raise MissingFileError(
            f"A trajectory must be a file that is there, or a run of the method zo. Received {str(path)!r}. Try a "
            "run's folder, or its `trajectory`."
        )
    try:
        return Reader(path)
    except TrajectoryError as error:
        raise RunError(str(error)) from None


def put_start(model: torch.nn.Module, trajectory: Reader) -> None:
    """Puts the weights that a run began with, and its base has not, into a model loaded by the run's recipe."""
    try:
        load_trainable_state(model, trajectory.start())
    except TrajectoryError as error:
        raise RunError(str(error)) from None


def _changes(section: ZoSection, adapter: str) -> dict[str, Any]:
    """What a recipe changes in its preset. Adapters and heads get dense directions: small, and not matrices alone."""
    preset = preset_of(section.preset)
    changes = dict(preset.metric) if section.objective != _LOSS else {}
    changes |= {axis: value for axis in _AXES if (value := getattr(section, axis)) is not None}
    if adapter not in ("none", "qlora", "auto") and preset.options["direction"] == "low_rank":
        changes.setdefault("direction", "rademacher")
    return changes


class BatchRows:
    """How the engine reads a `Batch` as rows: a row is its sequences."""

    def count(self, batch: Batch) -> int:
        return batch.rows

    def weights(self, batch: Batch) -> torch.Tensor:
        return batch.weights

    def entries(self, batch: Batch) -> torch.Tensor | None:
        if len(batch.row) == batch.rows:
            return None
        return torch.bincount(batch.row, minlength=batch.rows).cpu()

    def select(self, batch: Batch, rows: torch.Tensor) -> Batch:
        device = batch.row.device
        rows = rows.to(device)
        sizes = torch.bincount(batch.row, minlength=batch.rows)
        starts = sizes.cumsum(0) - sizes
        picked = sizes[rows]
        before = torch.repeat_interleave(picked.cumsum(0) - picked, picked)
        within = torch.arange(len(before), device=device) - before
        sequences = torch.repeat_interleave(starts[rows], picked) + within

        def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.index_select(0, sequences)

        return replace(
            batch,
            input_ids=batch.input_ids.index_select(0, sequences),
            attention_mask=batch.attention_mask.index_select(0, sequences),
            row=torch.repeat_interleave(torch.arange(len(rows), device=device), picked),
            weights=batch.weights.index_select(0, rows),
            targets=of(batch.targets),
            read_at=of(batch.read_at),
            options=of(batch.options),
            gold=None if batch.gold is None else batch.gold.index_select(0, rows),
            places=None if batch.places is None else batch.places.index_select(0, rows),
        )


class ZerothOrder:
    """`ZO` on the task's loss, or on an objective.

    With adapters none and qlora a low-rank change becomes a LoRA file at the end.
    """

    info = INFO

    def __init__(
        self, model: torch.nn.Module, recipe: Recipe, optimizer: ZO, objective: Objective | None = None
    ) -> None:
        self.model, self.dtype, self.optimizer = model, _DTYPES[recipe.model.dtype], optimizer
        self.objective = objective
        self.low_rank = optimizer.options.direction == "low_rank"
        self.beside = recipe.adapter.name in learns_beside(recipe)
        self.peak, self.peak_given = optimizer.options.lr, recipe.train.learning_rate is not None
        self.epsilon = recipe.zo.epsilon
        self.calibrates = recipe.zo.calibrate is True
        self.found: Calibration | None = None
        self.held = False  # what was said last of a given rate
        self.told = False  # how losses are evaluated: known at the first step that the trajectory does not have
        self.rows = BatchRows()

    def step(self, batches: Sequence[Batch], loss: RowLosses, learning_rate: float) -> StepResult:
        """One step on sum(row losses) / sum(row weights) over all of `batches`, or on the value of the objective there.

        Before the first, the calibration, and before the next few and one now and then, what their rows add to it.
        """

        def losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
            with autocast(batch.input_ids.device, self.dtype):
                return loss(model, batch)

        notes, spent = (), 0
        try:
            if self._calibrating:
                found = self.optimizer.calibrate(
                    losses, *batches, rows=self.rows, objective=self.objective, before=self.found, epsilon=self.epsilon
                )
                self.found, spent = found, found.forwards
                holds = self.peak_given and found.lr < self.peak
                if found.batches in (1, BATCHES) or (holds and not self.held):
                    notes, self.held = (f"Calibration: {found.reason}{self._held(found)}",), holds
            rate = learning_rate * self._scale()
            value = self.optimizer.step_batch(losses, *batches, rows=self.rows, lr=rate, objective=self.objective)
        except ArithmeticError as error:
            raise TrainingError(str(error)) from None
        last = self.optimizer.last
        assert last is not None
        if last.forwards and not self.told:
            self.told = True
            what = "Losses are evaluated" if self.objective is None else "The objective is evaluated"
            mode = self.optimizer.mode
            notes = (*notes, f"{what} {'with ' if mode.startswith('both') else ''}{mode}.")
        scalars = {
            "learning_rate": rate,
            "projected_gradient": float(np.sqrt(np.mean(np.square(last.gradients)))),
            "queries": float(len(last.gradients)),
            "row_forwards": float(last.forwards + spent),
        }
        if self.objective is not None:
            scalars["objective"] = -value
        return StepResult(value, last.forwards + spent, scalars, notes)

    def learned(self) -> dict[str, torch.Tensor]:
        if self.optimizer.trajectory is not None:
            self.optimizer.trajectory.sync()  # no checkpoint may be of a step that a power cut takes out of the log
        return {name: tensor.detach().clone() for name, tensor in self.optimizer.learned().items()}

    def load_learned(self, learned: Mapping[str, torch.Tensor]) -> None:
        try:
            self.optimizer.load_learned(learned)
        except (ValueError, KeyError) as error:
            raise RunError(f"A state must be of the recipe it was written with. Received another: {error}") from None

    def _scale(self) -> float:
        """What the schedule's rate is multiplied by. A given peak is held at the calibrated one."""
        if self.peak_given:
            return 1.0 if self.found is None else min(1.0, self.found.lr / self.peak)
        return self.peak if self.found is None else self.found.lr

    def _held(self, found: Calibration) -> str:
        if not self.peak_given:
            return ""
        instead = "as given" if self.peak <= found.lr else f"not {self.peak:g}, which needs zo.calibrate=false"
        return f" The learning rate is {min(self.peak, found.lr):g}, {instead}."

    @property
    def _calibrating(self) -> bool:
        if self.found is None or not self.calibrates:
            return self.calibrates
        later = self.objective is None and self.optimizer.steps % CALIBRATE_EVERY == 0
        return self.found.batches < BATCHES or later

    def state(self) -> dict[str, torch.Tensor]:
        found = [] if self.found is None else [getattr(self.found, name) for name in _MEASURED]
        said = torch.tensor([self.told, self.held])
        return {"said": said, "calibration": torch.tensor(found, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        (self.told, self.held), found = state["said"].tolist(), state["calibration"].tolist()
        if found:
            known: dict[str, Any] = dict(zip(_MEASURED, found, strict=True))
            known |= {name: int(known[name]) for name in ("forwards", "batches")}
            self.found = Calibration(**known, reason="")
            self.optimizer.param_groups[0]["epsilon"] = self.found.epsilon

    def finish(self) -> torch.nn.Module:
        if self.optimizer.trajectory is not None:
            self.optimizer.trajectory.close()
        if self.beside and self.low_rank:
            assert isinstance(self.model, PreTrainedModel)
            factors = self.optimizer.factors()
            self.optimizer.detach()
            return add_factors(self.model, factors, self.optimizer.options.max_rank)
        if self.beside:
            for part in self.optimizer.parts:  # one after the other: a copy of all would be the run's peak
                for site, value in part.values():
                    site.parameter.data = value  # fp32: with what 16 bits could not hold
        self.optimizer.detach()
        return self.model.float().requires_grad_(True) if self.beside else self.model
