"""The main job, end to end: prepare, say what will happen, train, measure against baselines, keep, report."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunefork.errors import Interrupted, MissingExtraError, RunError, TrainingError, TuneforkError
from tunefork.evaluate.baselines import BaselineResult
from tunefork.evaluate.harness import Asking, look_metrics, predict_examples
from tunefork.evaluate.objective import make_objective
from tunefork.evaluate.start import start_head_from_probe
from tunefork.evaluate.stored import shown_text, write_predictions
from tunefork.evaluate.summary import measure
from tunefork.files import staged_folder
from tunefork.hosted import is_hosted
from tunefork.methods import learns_beside, make_method
from tunefork.methods.zo import open_trajectory, put_start
from tunefork.models import load_model, save_artefact, torch_dtype
from tunefork.recipe import OPEN, Reason, Recipe, all_paths, dump_recipe, load_recipe, make_recipe
from tunefork.report import render_report
from tunefork.run import RunFolder
from tunefork.tasks import Example, Hits, Prediction, row_losses
from tunefork.train.checkpoint import Loaded, environment, load_newest
from tunefork.train.forecast import Forecast, forecast
from tunefork.train.interrupt import Interrupt
from tunefork.train.loop import Event, TrainResult, train
from tunefork.train.memory import PeakMeter
from tunefork.train.prepare import Job, prepare, refuse_errors

if TYPE_CHECKING:
    from tunefork.hosted.prices import Estimate
    from tunefork.workflows.hosted_plan import HostedPlan


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is about to do; shown before the first step."""

    job: Job
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run: its folder, and what result.json holds."""

    path: Path
    result: Mapping[str, Any]


class Listener:
    """Hears what a run does. Every method may be overridden; by default nothing is shown."""

    def plan(self, plan: Plan) -> None: ...
    def event(self, event: Event) -> None: ...
    def stage(self, text: str) -> None: ...
    def hosted(self, plan: HostedPlan) -> None: ...
    def confirm(self, estimate: Estimate) -> bool:
        return False  # nothing is paid for that nobody agreed to; `hosted.limit` does without the question


def plan_run(recipe: Recipe, *, resume: bool = False) -> Plan:
    """Everything that is known before the first step. Writes nothing; findings may hold errors.

    Raises RunError at once where the run could not be kept in `out`, or with `resume` not go on from there.
    """
    if recipe.out is not None:
        RunFolder.open(recipe.out, write=False) if resume else RunFolder.refuse_taken(recipe.out)
    job = prepare(recipe)
    if not job.rendered["train"]:  # there is nothing to forecast, and the findings say why
        refuse_errors(job.findings)
    return Plan(job, forecast(job))


def finetune(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
) -> RunResult:
    """Fine-tunes, measures and keeps a model. `recipe` is a Recipe, a mapping like it, or the path of a YAML file.

    Raises TuneforkError: with exit_code 2 nothing was written; Interrupted (130) leaves everything up to the last
    step, and `resume=True` goes on from there, bitwise as if it had never stopped.
    """
    listener = listener or Listener()
    recipe = as_recipe(recipe)
    if recipe.train.method == "hosted" or is_hosted(recipe.model.name):
        from tunefork.workflows.hosted import finetune_hosted

        return finetune_hosted(recipe, resume=resume, listener=listener)
    if resume:
        return _resume(recipe, listener)
    recipe = recipe if recipe.out is not None else recipe.model_copy(update={"out": str(free_folder(recipe))})
    plan = plan_run(recipe)
    listener.plan(plan)
    refuse_errors(plan.job.findings)
    created = RunFolder.create(Path(str(recipe.out)), dump_recipe(plan.job.recipe))
    with created as run, _traced(run), Interrupt() as interrupt:
        run.append_log(
            0, "plan", {"reasons": [asdict(r) for r in plan.job.resolved.reasons], "forecast": asdict(plan.forecast)}
        )
        return _run(run, plan, None, listener, interrupt)


def _resume(recipe: Recipe, listener: Listener) -> RunResult:
    """Goes on with the run in `recipe.out`, by the recipe that is kept there."""
    if recipe.out is None:
        raise RunError("`resume` needs the run's folder. Received no `out`. Try --out runs/NAME.")
    with RunFolder.open(Path(recipe.out), write=True) as run, _traced(run), Interrupt() as interrupt:
        kept = load_recipe(run.recipe_path)
        refuse_changes(recipe, kept)
        if run.finished:
            if not run.report_path.exists():  # killed between the two
                finish_report(run)
            return RunResult(run.path, run.read_result())
        plan = plan_run(kept.model_copy(update={"out": str(run.path)}), resume=True)
        before = next((entry for entry in run.read_log() if entry["kind"] == "plan"), None)
        if before is not None:  # `auto` has been a value since the first start; its reasons are in the log
            reasons = tuple(Reason(**reason) for reason in before["reasons"])
            plan = replace(plan, job=replace(plan.job, resolved=replace(plan.job.resolved, reasons=reasons)))
        listener.plan(plan)
        refuse_errors(plan.job.findings)
        return _run(run, plan, load_newest(run), listener, interrupt)


@contextlib.contextmanager
def _traced(run: RunFolder) -> Generator[None]:
    """Keeps the traceback of an error that is no sentence of ours in the run's error.log."""
    try:
        yield
    except TuneforkError:
        raise
    except Exception:
        with contextlib.suppress(TuneforkError):
            run.write_error(traceback.format_exc())
        raise


def refuse_changes(given: Recipe, kept: Recipe) -> None:
    """A resumed run is the same run: what was given now must be what it was begun with."""
    changed: list[str] = []
    for path, _ in all_paths():
        mine, theirs = _at(given, path), _at(kept, path)
        if path != "out" and _is_set(given, path) and mine not in ("auto", theirs) and (path, mine) not in OPEN:
            changed.append(f"{path} (kept: {theirs}, given: {mine})")
    if changed:
        raise RunError(
            f"A run must be resumed with its own recipe. Received changes of {', '.join(changed)}. "
            "Try --resume with only --out, or a new run."
        )


def _is_set(recipe: Recipe, path: str) -> bool:
    """Whether a key was given, rather than left at its default."""
    section: Any = recipe
    for name in path.split("."):
        if name not in section.model_fields_set:
            return False
        section = getattr(section, name)
    return True


def _at(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name)
    return value


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Whatever describes a recipe, as a Recipe."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, Path)):
        return load_recipe(recipe)
    return make_recipe(recipe)


def free_folder(recipe: Recipe) -> Path:
    """`runs/TASK-MODEL-N` with the first N that is not there yet."""
    stem = f"{Path(recipe.task.name).name}-{Path(recipe.model.name).name}"
    return next(p for n in range(1, 100_000) if not (p := Path("runs") / f"{stem}-{n}").exists())


def _run(run: RunFolder, plan: Plan, resumed: Loaded | None, listener: Listener, interrupt: Interrupt) -> RunResult:
    job, recipe = plan.job, plan.job.recipe
    asking = job.asking(interrupt.check)
    with PeakMeter(job.device) as memory:
        on_event = log_to(run, listener, recipe.train.tensorboard, memory)
        with _goes_on(run, "has taken no step yet" if resumed is None else "is as it was"):
            listener.stage("loading the model")
            model = load_model(
                job.facts,
                form=job.task.form,
                labels=job.task.labels,
                adapter=recipe.adapter,
                device=job.device,
                dtype=torch_dtype(recipe.model.dtype),
                seed=recipe.seed,
                activation_checkpointing=bool(recipe.train.activation_checkpointing),
                frozen=recipe.adapter.name in learns_beside(recipe),
                prefix_examples=_prefix_examples(job),
            )
            if run.trajectory_path.exists():
                put_start(model, open_trajectory(run.trajectory_path))
            elif job.starts_from_probe:
                listener.stage(start_head_from_probe(model, asking, job.rendered["train"], recipe.seed))
        model, trained = _train(run, job, model, asking, resumed, on_event, interrupt)
    peak = memory.value
    with staged_folder(run.model_path) as folder:
        save_artefact(model, job.tokenizer, job.facts, folder, _rendering(job))

    started = time.perf_counter()
    with _goes_on(run, "is trained and not yet measured"):
        listener.stage("measuring on the test rows")
        test = job.examples["test"]
        chat = job.task.form == "chat"  # replies are long, but whether they end by themselves is worth it once
        predictions = predict_examples(model, asking, test, generated=chat or None)
        del model
        listener.stage("measuring the baselines")
        baselines = job.measure_baselines(recipe.evaluate.baselines, asking)
    seconds = time.perf_counter() - started

    result = {
        "recipe": recipe.model_dump(mode="json"),
        "reasons": [asdict(reason) for reason in plan.job.resolved.reasons],
        "data": {
            "counts": job.counts(),
            "origin": dict(job.origin),
            "findings": [asdict(finding) for finding in job.findings],
        },
        "model": job.facts.summary(),
        "rendering": job.renderer.describe(),
        "steps": trained.progress.step,
        "steps_per_epoch": plan.job.resolved.steps_per_epoch,
        "forwards": trained.progress.forwards,
        "seconds": {"train": trained.progress.seconds, "evaluate": seconds},
        "peak_memory_bytes": {"kind": memory.kind, "value": peak, "forecast": plan.forecast.memory_bytes},
        "train": {
            "stopped_early": trained.stopped_early,
            "weights_from_step": trained.weights_from,
            "looks": trained.progress.curve,
            "notes": list(trained.notes),
        },
        "metric": job.task.metric,
        "labels": list(job.task.labels),
        "environment": environment(job.device, recipe.model.dtype),
        "baselines": {name: dict(b.metrics) for name, b in baselines.items()},
        "baseline_notes": {name: {"seconds": b.seconds, "notes": list(b.notes)} for name, b in baselines.items()},
        "test": measure(job.task, predictions, recipe.evaluate, recipe.seed),
    }
    return keep_result(run, result, predictions, test, baselines, listener)


def keep_result(
    run: RunFolder,
    result: Mapping[str, Any],
    predictions: Sequence[Prediction],
    test: Sequence[Example],
    baselines: Mapping[str, BaselineResult],
    listener: Listener,
) -> RunResult:
    """Writes what a run ends with: every prediction on the rows of `test`, result.json, the report."""
    write_predictions(run, "test", predictions, [shown_text(e) for e in test])
    for name, baseline in baselines.items():
        write_predictions(run, f"test-{name}", baseline.predictions)
    run.write_result(result)
    listener.stage("writing the report")
    finish_report(run)
    return RunResult(run.path, run.read_result())


@contextlib.contextmanager
def _goes_on(run: RunFolder, state: str) -> Generator[None]:
    """Says how to go on where a run is stopped before its training or after it."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Interrupted(f"{str(stop) or 'Stopped.'} {run.path} {state}; --resume goes on.") from None


def finish_report(run: RunFolder) -> None:
    """The report of a run that is finished whether or not it can be written: exit code 2 would deny that."""
    try:
        run.write_report(render_report(run))
    except TuneforkError as error:
        raise TrainingError(
            f"{run.path} is trained and measured, but its report must still be written. Received: {error} "
            f"Try `tunefork report {run.path}` once that is mended."
        ) from error


def _train(
    run: RunFolder,
    job: Job,
    model: torch.nn.Module,
    asking: Asking,
    resumed: Loaded | None,
    on_event: Callable[[Event], None],
    interrupt: Interrupt,
) -> tuple[torch.nn.Module, TrainResult]:
    recipe, dev = job.recipe, job.examples["dev"]
    about = {
        "recipe": recipe.model_dump(mode="json", exclude={"out"}),
        "base": job.facts.summary(),
        "rendering": _rendering(job),
    }
    objective = make_objective(recipe.zo.objective, asking, job.rendered["train"])
    method = make_method(model, recipe, run.trajectory_path, about, objective)
    hits = Hits()
    loss = partial(row_losses, hits=hits) if method.info.needs_backward else row_losses  # probes are not the model

    def with_hits(event: Event) -> None:
        on_event(replace(event, values={**event.values, **hits.taken()}) if event.kind == "step" else event)

    trained = train(
        run=run,
        recipe=recipe,
        steps=job.resolved.steps,
        model=model,
        method=method,
        loss=loss,
        renderer=job.renderer,
        rows=job.rendered["train"],
        look=(lambda model, _: look_metrics(model, asking, dev, job.rendered["dev"])) if dev else None,
        resume=resumed,
        on_event=with_hits,
        interrupt=interrupt,
    )
    return method.finish(), trained


def _prefix_examples(job: Job) -> Any:
    """Training prompts whose activations a prefix starts from (MeZO, section on prefix tuning)."""
    if job.recipe.adapter.name != "prefix":
        return None
    longest = sorted(job.rendered["train"], key=lambda r: -len(r.ids))[:1]
    return job.renderer.batch(longest)


def _rendering(job: Job) -> dict[str, Any]:
    """What an artefact must carry so that it is asked the way it was trained."""
    recipe = job.recipe
    return {
        "task": recipe.task.model_dump(mode="json"),
        "fields": dict(recipe.data.fields),
        "layout": recipe.data.layout,
        "label_map": recipe.data.labels,
        "labels": list(job.task.labels),
        "max_length": job.renderer.max_length,
        "dtype": recipe.model.dtype,
        "rendering": job.renderer.describe(),
    }


def log_to(
    run: RunFolder, listener: Listener, tensorboard: bool, memory: PeakMeter | None = None
) -> Callable[[Event], None]:
    """One listener for the loop: the run's log, TensorBoard if asked for, and whoever is watching.

    A watcher is also told `peak_memory_bytes`, the peak so far by `memory`, of which the result keeps the last.
    """
    board = _board(run) if tensorboard else None
    started = time.perf_counter()

    def on_event(event: Event) -> None:
        values = {**event.values, "seconds": round(time.perf_counter() - started, 3)}
        if event.kind in ("step", "look", "resume"):
            run.append_log(event.step, event.kind, values)
        if board is not None:
            for name, value in event.values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    board.add_scalar(f"{event.kind}/{name}", value, event.step)
            board.flush()
        peak = None if memory is None else memory.value
        listener.event(replace(event, values={**values, "peak_memory_bytes": peak}))

    return on_event


def _board(run: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("tensorboard", "tracking", "`train.tensorboard`") from None
    return SummaryWriter(str(run.path / "tensorboard"))
