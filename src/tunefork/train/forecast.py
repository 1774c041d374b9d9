"""Time and peak memory of a run, before its first step: the run's own code, simulated without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tunefork.batch import Batch
from tunefork.methods import learns_beside, make_method, method_info, steps_only
from tunefork.models import quiet, torch_dtype
from tunefork.render import Rendered
from tunefork.tasks import row_losses
from tunefork.tasks.loss import IGNORED
from tunefork.train import speed
from tunefork.train.prepare import Job
from tunefork.train.simulation import Peak, Simulation, Work
from tunefork.train.skeleton import build_skeleton, fake_weights
from tunefork.train.workload import BatchPlan, Looks, plan_batches, simulate_look, simulate_start

START_UP_BYTES = 10 * 2**20
"""Thread pools, kernels' scratch and Python's own objects, once a model runs."""

_REPLAYED = 200  # steps whose effect on the heap is followed; later ones find holes that fit

_REST = {"load": "loading", "step": "activations", "look": "evaluation", "start": "features", "save": "checkpoint"}
_DISK_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take.

    `parts` sum to `memory_bytes`, the peak as `PeakMeter` counts it. `phases` are the peaks of load, step, look and
    save, and of a start from a probe; the highest is `memory_bytes`. `mapped_bytes` come on top: frozen weights that a
    CPU reads in place from their file, which the system counts as file cache. `seconds` are those of training, looks at
    dev included.
    """

    seconds: float | None
    memory_bytes: int
    parts: Mapping[str, int]
    how: str
    phases: Mapping[str, int]
    mapped_bytes: int = 0
    step_seconds: float | None = None  # of all training steps, without the looks


def forecast(job: Job) -> Forecast:
    """Simulates loading, the heaviest step, a look at dev and a save. Reads no weights, and changes nothing.

    An architecture that decides by the values it computes cannot be simulated: the forecast is then coarse, `how` says
    so, and `seconds` is None.
    """
    if not job.rendered["train"]:
        return Forecast(None, 0, {}, "There are no rows to train on.", {})
    plan = plan_batches(job)
    simulation = Simulation(job.device)
    try:
        with quiet(), torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
            return _simulated(job, plan, simulation)
    except RuntimeError as error:  # a shape that depends on values, or a kernel without a stand-in
        return _coarse(job, plan, error)


def _simulated(job: Job, plan: BatchPlan, simulation: Simulation) -> Forecast:
    marks: list[Work] = []
    seen: dict[tuple[int, ...], tuple[torch.Tensor, Work]] = {}  # in this step

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        marks.append(simulation.work.copy())
        asked = torch.zeros(1, 1) if batch.targets is None else batch.targets != IGNORED
        shape = (batch.rows, *batch.input_ids.shape, int(asked.any(0).sum()), int(asked.sum()))
        if shape not in seen:
            losses = row_losses(model, batch)
            if method.info.needs_backward:
                return losses
            seen[shape] = losses, simulation.work.since(marks[-1])
        else:  # a pass without a backward one leaves nothing behind: one of a kind tells of all
            simulation.work.add(seen[shape][1])
        return seen[shape][0]

    def step(micro: Sequence[Sequence[Rendered]]) -> Work:
        marks.clear()
        seen.clear()
        method.step([job.renderer.batch(rows, learn=True).to(job.device) for rows in micro], loss, 1e-4)
        return simulation.work.copy()

    def tag_gradient(parameter: torch.Tensor) -> None:
        simulation.tag([parameter.grad] if parameter.grad is not None else [], "gradients")

    model = _skeleton(job)
    with simulation:
        with simulation.phase("load"):
            fake_weights(model, job.device, torch_dtype(job.recipe.model.dtype))
            simulation.tag([*model.parameters(), *model.buffers()], "weights")
        if job.starts_from_probe:
            with simulation.phase("start"):
                simulate_start(job, model)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(tag_gradient)
        method = make_method(model, steps_only(job.recipe))
        step([plan.typical])  # what a method does once
        simulation.tag_rest("optimizer state")
        end = step([plan.typical, plan.typical])
        half = marks[len(marks) // 2]  # a micro-batch is a pass, or several alike
        micro, last = half.since(marks[0]), end.since(half)  # one; another one and the update
        if job.device.type == "cpu":
            heaviest = plan.heaviest if method.info.needs_backward else plan.heaviest[-1:]
            with simulation.recorded() as light:
                step([plan.typical] * len(heaviest))
            with simulation.recorded() as heavy:
                step(heaviest)
            spread = max(1, plan.heaviest_padded - plan.typical_padded)
            shares = [(size - plan.typical_padded) / spread for size in plan.step_sizes[:_REPLAYED]]
            simulation.replay(light, heavy, shares)
        with simulation.phase("step"):
            step(plan.heaviest)
        looks = Looks()
        if job.rendered["dev"]:
            with simulation.phase("look"):
                looks = simulate_look(job, model, simulation)
        with simulation.phase("save"):
            copies = method.learned(), method.state()
            del copies

    one = speed.cost(micro, job.device)
    update = max(0.0, speed.cost(last, job.device).seconds - one.seconds)
    steps = plan.steps * update + plan.micro_batches * one.scaled(plan.mean_padded / plan.typical_padded).seconds
    look = looks.count * sum(
        speed.cost(work, job.device).scaled(size).seconds for work, sizes in looks.batches for size in sizes
    )
    mapped = _mapped(job, model, simulation)
    phases = {name: _parts(peak, name, mapped, _start_up(job)) for name, peak in simulation.phases.items()}
    if job.device.type == "cuda":  # there AdamW makes the square roots of all second moments at once
        phases["step"]["activations"] += max(0, sum(p.numel() * 4 for p in trained) - phases["step"]["activations"])
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    highest = max(totals, key=lambda name: (totals[name], -phases[name].get("allocator", 0)))
    how = (
        f"Memory: the highest of {', '.join(totals)} (here {highest}), simulated tensor by tensor for the heaviest "
        "micro-batch. Time: the operations of a typical one, at this machine's speed as measured just now"
        f"{', without those of the calibration' if job.recipe.zo.calibrate and method.info.name == 'zo' else ''}."
    )
    return Forecast(steps + look, totals[highest], phases[highest], how, totals, mapped, steps)


def _skeleton(job: Job) -> torch.nn.Module:
    recipe = job.recipe
    return build_skeleton(
        job.facts,
        form=job.task.form,
        labels=job.task.labels,
        adapter=recipe.adapter,
        frozen=recipe.adapter.name in learns_beside(recipe),
        activation_checkpointing=bool(recipe.train.activation_checkpointing),
    )


def _parts(peak: Peak, phase: str, mapped: int, start_up: int) -> dict[str, int]:
    """Bytes by what they are for; those of weights that stay in their file are not the process's own."""
    parts = {name or _REST[phase]: size for name, size in peak.parts.items()}
    parts["weights"] -= mapped
    return {name: size for name, size in {**parts, "start-up": start_up}.items() if size}


def _start_up(job: Job) -> int:
    return START_UP_BYTES + (method_info(job.recipe.train.method).kernel_bytes if job.device.type == "cpu" else 0)


def _mapped(job: Job, model: torch.nn.Module, simulation: Simulation | None) -> int:
    """Bytes of weights that a CPU uses where they lie in the file: never written, and in the format they have there.

    Without a simulation, whether a method writes what has no gradient is not known, and is taken as said.
    """
    if job.device.type != "cpu" or (simulation is None and not method_info(job.recipe.train.method).needs_backward):
        return 0
    stored = _DISK_DTYPES[job.facts.dtype_on_disk]
    read = [p for p in model.parameters() if not p.requires_grad and not (simulation and simulation.wrote(p))]
    frozen = [p for p in read if p.dtype == stored]
    return sum(s.nbytes() for s in {p.untyped_storage()._cdata: p.untyped_storage() for p in frozen}.values())


def _coarse(job: Job, plan: BatchPlan, error: BaseException) -> Forecast:
    """Without a simulation: exact for what stays, a rule of thumb for what passes.

    A block keeps about 34 bytes a token and hidden unit in 16 bit (Korthikanti et al. 2022, arXiv 2205.05198, without
    the attention matrix), twice that in fp32; with checkpointing 2, and one block at a time.
    """
    model = _skeleton(job)
    fake_weights(model, job.device, torch_dtype(job.recipe.model.dtype))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    facts, width = job.facts, 2 if job.recipe.model.dtype == "fp32" else 1
    token = facts.hidden * width * (34 * facts.layers)
    if job.recipe.train.activation_checkpointing:
        token = facts.hidden * width * (34 + 2 * facts.layers)
    passing = plan.heaviest_padded * (token + 12 * facts.vocab)
    mapped = _mapped(job, model, None)
    parts = {
        "weights": weights - mapped,
        "gradients": 4 * trained,
        "optimizer state": 8 * trained,
        "activations": passing,
        "start-up": _start_up(job),
    }
    why = str(error).strip().partition("\n")[0][:160]
    how = (
        f"Coarse, within a factor of two: {facts.architecture} cannot be simulated ({type(error).__name__}: {why}), "
        "so weights and optimizer are counted, and activations follow a rule of thumb."
    )
    total = sum(parts.values())
    return Forecast(None, total, parts, how, {"step": total}, mapped)
