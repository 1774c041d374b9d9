"""`ZO`: zeroth-order fine-tuning behind torch's optimizer interface."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tunefork.zo.calibrate import Calibration, calibrate, refined
from tunefork.zo.calibrate_metric import calibrate_metric, refined_metric
from tunefork.zo.closures import ClosureProbe
from tunefork.zo.directions import LowRank, build
from tunefork.zo.directions.lora_file import Factors, lora_factors, no_lora_file, write_adapter
from tunefork.zo.engine import Engine, Step, Uninterrupted
from tunefork.zo.estimators import ESTIMATORS
from tunefork.zo.measured import Objective
from tunefork.zo.options import check_numbers, check_seed, logged_options, options_of
from tunefork.zo.probes import BatchProbe, LossFn, Probe, Stacking
from tunefork.zo.rows import Rows, TensorRows
from tunefork.zo.sites import choose, fingerprint
from tunefork.zo.trajectory import Header, Reader, Record, Trajectory, TrajectoryError, environment, replay
from tunefork.zo.updates import Updates


class ZO(torch.optim.Optimizer):
    """Trains a model from its losses alone: no gradient is computed, and the memory is that of running it.

    Each step evaluates the loss on two sides of the weights along random directions and moves along those
    (MeZO, Malladi et al. 2023, arXiv 2305.17333). With low-rank directions, the default, no weight is ever written:
    what is learned lies beside the model and is added to its layers' outputs while the optimizer is attached.

        with ZO(model, lr=1e-5, seed=0) as opt:
            for batch in batches:
                loss = opt.step(lambda: model(**batch).loss)
            opt.finish("adapter")

    Args:
        model: any torch module; quantised linear layers too, with low-rank directions.
        preset: `default`, `mezo` or `fzoo`.
        lr, epsilon: learning rate and distance of a probe; None: the preset's. `calibrate` measures better ones.
        seed: of the directions. The global random state is never touched.
        trajectory: a file to log every step to. Where it exists, the model must be the same base: the steps in it are
            done again, without evaluating anything, one for each call of `step`, or all at once by `catch_up`.
        run: what else decides the run's numbers, such as a recipe's hash; kept in the trajectory's header.
        start: weights of the model that its base does not have, a fresh head or adapter; the trajectory keeps them.
        about: what else the trajectory tells whoever rebuilds the model.
        changes: options of `Options` that differ from the preset's.

    What a step saw is in `last`; `no_lora_file` says what keeps the result from being a LoRA file, if anything does.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        preset: str = "default",
        lr: float | None = None,
        epsilon: float | None = None,
        seed: int = 0,
        trajectory: str | Path | None = None,
        run: Mapping[str, Any] | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
        about: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        given = {k: v for k, v in (("lr", lr), ("epsilon", epsilon)) if v is not None}
        self.options = o = options_of(preset, {**changes, **given})
        self.model, self.preset, self.seed = model, preset, check_seed(seed)
        self.sites = choose(model, o.train, o.also, matrices=o.direction == "low_rank")
        super().__init__(
            [site.parameter for site in self.sites],
            {"lr": o.lr, "epsilon": o.epsilon, "weight_decay": o.weight_decay},
        )
        self.parts = build(self.sites, o.direction, rank=o.rank, max_rank=o.max_rank, queries=o.queries, seed=self.seed)
        self.stacking = Stacking(self.sites[0].parameter.device, o.stack)
        self.engine = Engine(
            model, self.parts, ESTIMATORS[o.estimator], Updates(o.rule), queries=o.queries, split=o.rows == "split"
        )
        self.last: Step | None = None
        self._records: Iterator[Record] | None = None
        self.finished = self.left = False
        self.no_lora_file = no_lora_file(model, self.parts)
        try:
            if o.also and self.no_lora_file:
                warnings.warn(f"This run gives no LoRA file, because of {self.no_lora_file}.", stacklevel=2)
            self.trajectory = None if trajectory is None else self._open(trajectory, run or {}, start, about or {})
        except BaseException:  # whoever made it has nothing to detach it by
            self.detach()
            raise

    @classmethod
    def from_trajectory(
        cls,
        model: torch.nn.Module,
        trajectory: str | Path | Reader,
        step: int | None = None,
        learned: Mapping[str, torch.Tensor] | None = None,
    ) -> ZO:
        """The optimizer after `step` steps (None: all) of a trajectory, which is only read: nothing is evaluated.

        Args:
            model: the base that it was begun on, with the weights that `Reader.start` gives in their place.
            learned: what `learned` returned at a step up to that one; only later ones are then done again.

        Raises TrajectoryError for another base, a step that the file does not have, and a damaged file.
        """
        reader = trajectory if isinstance(trajectory, Reader) else Reader(trajectory)
        header = reader.header
        step = reader.steps if step is None else step
        if step not in range(reader.steps + 1):
            raise TrajectoryError(
                f"`step` must be from 0 to {reader.steps:,}, the steps that {reader.path} has. Received {step!r}. "
                "Try leaving it out."
            )
        seed, options = logged_options(header.run)
        found = cls(model, seed=seed, **options.to_dict())
        own = {"queries": options.queries, "window": options.rule.window}
        difference = header.difference(replace(header, **own, run={**header.run, **found._identity()}))
        if difference:
            found.detach()
            raise TrajectoryError(
                f"A trajectory must be replayed on the base it was begun on. {reader.path} is of another: "
                f"{difference}. Try the model that was trained, in the number format it was trained in."
            )
        if learned is not None:
            found.load_learned(learned)
        replay(found.engine, reader.records(found.steps, int(step)))
        return found

    def _identity(self) -> dict[str, Any]:
        """What decides the steps besides batches and rates, for a trajectory's header."""
        return {
            "base": fingerprint(self.model),
            "options": {k: v for k, v in self.options.to_dict().items() if k not in _FREE},
            "parameters": [[site.name, list(site.parameter.shape)] for site in self.sites],
            "seed": self.seed,
        }

    def _open(
        self,
        path: str | Path,
        run: Mapping[str, Any],
        start: Mapping[str, torch.Tensor] | None,
        about: Mapping[str, Any],
    ) -> Trajectory:
        o, own = self.options, self._identity()
        if taken := sorted({*own, "noise", "queries", "start", "window"} & run.keys()):
            raise ValueError(f"`run` must name what else decides a run. Received {', '.join(taken)}. Try another name.")
        here = environment(self.stacking.device.type, o.stack or f"{self.stacking.places} places")
        found = Trajectory(path, Header(o.queries, o.rule.window, {**own, **run}, here, about=about), start)
        for name, then, now in found.changes:
            warnings.warn(
                f"The same bits need the same {name}: the trajectory was begun with {then!r}, this is {now!r}. "
                "Steps that are done again are the same; later ones may differ in the last bits.",
                stacklevel=3,
            )
        self.engine.log = found
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on a closure that returns the loss of the same batch each time it is called, without backward().

        A tensor is evaluated for two sides in one pass (for `stack` sides where that is given), a number side after
        side; `mode` says which it was. Every query sees the closure's whole batch. Returns the mean of the losses on
        the two sides; with a one-sided estimator, the loss where the model stands.
        """
        if closure is None:
            raise ValueError(
                "A zeroth-order step evaluates the loss itself. Received no closure. Try "
                "opt.step(lambda: model(**batch).loss), or opt.step_batch(loss_fn, batch)."
            )
        return self._step(ClosureProbe(self.model, closure, self.stacking), None)

    @torch.no_grad()
    def step_batch(
        self,
        loss_fn: LossFn,
        *batches: Any,
        rows: Rows | None = None,
        lr: float | None = None,
        objective: Objective | None = None,
    ) -> float:
        """One step on a batch, given whole or as micro-batches.

        Args:
            loss_fn: (model, batch) -> fp32 losses [rows]; the step's loss is their sum over the sum of `rows.weights`.
            batches: a tensor, or a mapping, list or tuple of tensors [rows, ...]; more than one: micro-batches.
            rows: how rows are read out of other kinds of batch.
            lr: of this step; None: the param group's.
            objective: raised in place of lowering the losses. A step in which all its sides tie changes nothing.

        Returns what `step` does; with an objective, of its value with a minus, or this where the model stands if that
        was looked at.
        """
        return self._step(BatchProbe(self.model, loss_fn, batches, rows or TensorRows(), self.stacking, objective), lr)

    def _step(self, probe: Probe, lr: float | None) -> float:
        if self.finished or self.left:
            after = "finish()" if self.finished else "its `with`"
            raise RuntimeError(f"A finished optimizer takes no steps. Received one after {after}. Try a new ZO(model).")
        logged = self._logged()
        if logged is not None:
            self.engine.catch_up([(logged.gradients, logged.terms)])
            self.last = Step(logged.step, logged.loss, logged.gradients, logged.terms, 0)
            return logged.loss
        group = self.param_groups[0]
        names = ("lr", "epsilon", "weight_decay")
        numbers = {name: float(lr if name == "lr" and lr is not None else group[name]) for name in names}
        check_numbers(**numbers)  # a NaN in the log would be a NaN in every weight
        self._opt_called = True  # by which torch's schedules know that they come after a step
        self.last = self.engine.step(probe, **numbers)
        return self.last.loss

    def _logged(self) -> Record | None:
        """The next step, where the trajectory has it already."""
        if self.trajectory is None or self.steps == self.trajectory.steps:
            self._records = None
            return None
        if self._records is None:
            self._records = self.trajectory.records(self.steps)
        return next(self._records)

    def catch_up(self) -> int:
        """Does all steps again that the trajectory has beyond this one; how many there were."""
        before, self._records = self.steps, None
        if self.trajectory is not None:
            replay(self.engine, self.trajectory.records(self.steps))
        return self.steps - before

    @torch.no_grad()
    def calibrate(
        self,
        loss: Callable[..., Any],
        *batches: Any,
        rows: Rows | None = None,
        objective: Objective | None = None,
        before: Calibration | None = None,
        epsilon: float | None = None,
    ) -> Calibration:
        """Measures epsilon and lr for this model and task, sets them, and says why; nothing is learned.

        Args:
            loss: a closure, or with `batches` a `loss_fn` as for `step_batch`; `objective` likewise.
            epsilon: stays as given, and lr follows from the curvature measured with it; None: it is measured.
            before: what other rows gave: its epsilon stays, and lr follows from the mean curvature, over the last
                eight batches or so. Where a step has few rows, eight in turn make lr depend little on which
                they are; in a long run one now and then has it follow how the loss bends later.
        """
        if epsilon is not None:
            check_numbers(epsilon=epsilon)

        def probe() -> Probe:
            if not batches:
                return ClosureProbe(self.model, loss, self.stacking)
            return BatchProbe(self.model, loss, batches, rows or TensorRows(), self.stacking, objective)

        if before is not None:
            found = (refined if objective is None else refined_metric)(before, self.engine, probe, self.options.rule)
        else:
            choose = calibrate if objective is None else calibrate_metric
            found = choose(self.engine, probe, self.options.rule, epsilon)
        self.param_groups[0].update(lr=found.lr, epsilon=found.epsilon)
        return found

    @property
    def mode(self) -> str:
        """How the sides are evaluated: in one pass, or side after side and why."""
        return self.stacking.mode

    @property
    def steps(self) -> int:
        """Finished steps."""
        return self.engine.steps

    def learned(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must keep beside the base model, as tensors that are not copied."""
        return self._state(weights=True)

    @torch.no_grad()
    def load_learned(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `learned` returned, bit for bit; steps that the trajectory has after it will be done again.

        Raises ValueError, and changes nothing, where names or shapes differ or the trajectory ends earlier.
        """
        wanted = self._state(weights=any("/weight/" in name for name in state))
        for name in sorted({*wanted, *state} - {"past"}):
            mine, theirs = (None if name not in s else tuple(s[name].shape) for s in (wanted, state))
            if mine != theirs:
                raise ValueError(
                    f"The state must be of these parameters. Received `{name}` {theirs}, here it is {mine}."
                )
        if self.trajectory is not None and int(state["steps"]) > self.trajectory.steps:
            raise ValueError(
                f"A trajectory must reach to the state that is loaded. Received step {int(state['steps'])}, and "
                f"{self.trajectory.path} ends at {self.trajectory.steps}. Try an earlier state."
            )
        self._records = None
        with Uninterrupted():
            for i, part in enumerate(self.parts):
                part.load_state({k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{i}/")})
            self.engine.steps = int(state["steps"])
            self.engine.updates.load_state(self.engine.steps, state)

    def _state(self, *, weights: bool) -> dict[str, torch.Tensor]:
        held = {f"{i}/{k}": v for i, part in enumerate(self.parts) for k, v in part.state(weights=weights).items()}
        return {"steps": torch.tensor(self.engine.steps), **self.engine.updates.state(), **held}

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As small as an adapter: what was learned beside the model's own weights, and the param groups."""
        return {
            **super().state_dict(),
            "options": {**self.options.to_dict(), "seed": self.seed},
            "learned": self._state(weights=False),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Restores `state_dict`, bit for bit; dense directions need the model's own weights restored as well.

        Raises ValueError where the options or the seed differ.
        """
        own, given = {**self.options.to_dict(), "seed": self.seed}, state_dict["options"]
        differ = {k: (given.get(k), v) for k, v in own.items() if k not in _FREE and given.get(k) != v}
        if differ:
            name, (theirs, ours) = next(iter(differ.items()))
            raise ValueError(f"A state must be of the same options. Received `{name}` {theirs!r}, here it is {ours!r}.")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.load_learned(state_dict["learned"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: directions are made for the parameters chosen there."""
        if self.param_groups:
            raise ValueError(
                "Parameters are chosen when the optimizer is made. Received another group. Try ZO(model, also=[names])."
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def finish(self, folder: str | Path | None = None) -> Path | None:
        """Keeps what was learned, and detaches: as a LoRA adapter in `folder` that plain PEFT reads, or in the weights.

        Raises ValueError where the form cannot hold it: `no_lora_file`, or weights that are quantised.
        """
        if self.finished:
            raise RuntimeError("What was learned is kept once. Received a second finish(). Try a new ZO(model).")
        path = None if folder is None else self.write_adapter(folder)
        for part in self.parts if folder is None else ():  # first whether all can hold it, then one by one
            for _ in part.values():
                pass
        with Uninterrupted():  # half a change in the weights and all of it beside them would be no model
            for part in self.parts if folder is None else ():
                for site, value in part.values():
                    site.parameter.data.copy_(value)
            self.finished = True
            self.detach()
        return path

    @property
    def beside(self) -> bool:
        """Whether all that is learned lies beside the model's weights, which are never written."""
        return all(isinstance(part, LowRank) for part in self.parts)

    @torch.no_grad()
    def write_adapter(self, folder: str | Path) -> Path:
        """Writes what was learned so far as a PEFT adapter; training may go on."""
        return write_adapter(folder, self.model, self.parts)

    def factors(self) -> Factors:
        """fp32 A [max_rank, in] and B [out, max_rank] by linear layer: the learned change is B A."""
        return lora_factors(self.model, self.parts)

    def values(self) -> dict[str, torch.Tensor]:
        """Every trained parameter's learned value in fp32, by name. Raises ValueError for quantised ones."""
        return {site.name: value for part in self.parts for site, value in part.values()}

    def detach(self) -> None:
        """Takes the optimizer off until the next step. The model is as before, but for what dense directions train."""
        self.engine.detach()

    def __enter__(self) -> ZO:
        return self

    def __exit__(self, *_: object) -> None:
        self.left = True
        self.detach()
        if self.trajectory is not None:
            self.trajectory.close()


_FREE = ("lr", "epsilon", "weight_decay", "stack")
"""Options that may change from step to step, or where a run goes on."""
