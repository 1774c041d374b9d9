"""The training loop, to be read top to bottom: steps, looks at dev, checkpoints. It knows no method by name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tunefork.errors import Interrupted, RunError
from tunefork.methods.base import Method, RowLosses
from tunefork.recipe import Recipe
from tunefork.render import Rendered, Renderer
from tunefork.run import RunFolder
from tunefork.train.checkpoint import Loaded, environment, environment_differences, load_step, save_checkpoint
from tunefork.train.interrupt import Interrupt
from tunefork.train.sampler import micro_batches, sampler_of
from tunefork.train.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class Look:
    """One look at dev: the choosing metric, and everything else that was computed."""

    step: int
    metric: str
    value: float
    better: bool  # than every look before
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Event:
    """Something a listener may show or log."""

    kind: str  # "resume", "step", "note", "metrics" (a note that may be left out), "look", "checkpoint", "stop"
    step: int
    values: Mapping[str, Any]


@dataclass
class Progress:
    """What the loop carries from step to step, and a checkpoint keeps."""

    step: int = 0
    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    looks_without_better: int = 0
    looked_at: int = -1  # last step whose look is done; the first is before step 1
    curve: list[dict[str, Any]] = field(default_factory=list)  # the looks, for the report
    notes: list[str] = field(default_factory=list)  # what a person should know of the run


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How training ended. The method holds the best weights, or the last ones if the recipe says so."""

    progress: Progress
    stopped_early: bool
    weights_from: int  # step
    notes: tuple[str, ...]


def train(
    *,
    run: RunFolder,
    recipe: Recipe,
    steps: int,
    model: torch.nn.Module,
    method: Method,
    loss: RowLosses,
    renderer: Renderer,
    rows: Sequence[Rendered],
    look: Callable[[torch.nn.Module, Interrupt], tuple[str, float, bool, Mapping[str, float]]] | None,
    resume: Loaded | None,
    on_event: Callable[[Event], None],
    interrupt: Interrupt,
) -> TrainResult:
    """Trains `model` in place for `steps` steps over `rows`.

    `look(model, interrupt)` returns (metric name, value, higher is better, all metrics) on dev, or is None when
    there is no dev set. It looks before the first step too, so that the start may be the best. Raises Interrupted once
    everything up to the last finished step is saved.
    """
    options, device = recipe.train, next(model.parameters()).device
    sampler = sampler_of(rows, options, recipe.seed)
    lengths = [len(r.ids) for r in rows]
    progress = Progress()
    fingerprint = fingerprint_rows(rows)
    if resume is None:
        run.truncate_log(None)  # a run killed before its first checkpoint begins again
    else:
        if resume.state["rows"] != fingerprint:
            raise RunError("A resumed run must see the same rows. They have changed since it began. Try a new run.")
        progress, differences = _resume(resume, device, method)
        progress.notes += differences
        run.truncate_log(progress.step)
        skipped = [(str(path), why) for path, why in resume.skipped]
        on_event(Event("resume", progress.step, {"skipped": skipped, "differences": differences}))

    def save() -> None:
        keep = {progress.best_step} if progress.best_step is not None else set()
        save_checkpoint(
            run,
            progress.step,
            {"weights": method.learned(), "method": method.state()},
            {
                "progress": vars(progress),
                "environment": environment(device, recipe.model.dtype),
                "rows": fingerprint,
            },
            keep=options.keep_checkpoints,
            protect=keep,
        )
        on_event(Event("checkpoint", progress.step, {}))

    def look_now() -> None:
        assert look is not None
        metric, value, higher, metrics = look(model, interrupt)
        best = progress.best_value
        better = best is None or (value > best if higher else value < best)
        better = better or (value == best and progress.best_step == 0)  # of the start and its equal, what was trained
        if better:
            progress.best_step, progress.best_value, progress.looks_without_better = progress.step, value, 0
        else:
            progress.looks_without_better += 1
        progress.looked_at = progress.step
        entry = {"step": progress.step, "metric": metric, "value": value, "better": better, **metrics}
        progress.curve.append(entry)
        on_event(Event("look", progress.step, entry))

    def patience_lost() -> bool:
        return options.patience is not None and progress.looks_without_better >= options.patience

    def due(every: int | str) -> bool:
        return progress.step % int(every) == 0 or progress.step == steps

    saved = progress.step
    try:
        while True:
            if look is not None and due(options.evaluate_every) and progress.looked_at < progress.step:
                look_now()
                if (options.keep_best and progress.best_step == progress.step) or patience_lost():
                    save()
                    saved = progress.step
            if due(options.save_every) and saved < progress.step:
                save()
                saved = progress.step
            interrupt.check()
            if progress.step >= steps or patience_lost():
                break
            started = time.perf_counter()
            torch.manual_seed(_step_seed(recipe.seed, progress.step))  # dropout is a function of (seed, step)
            groups = micro_batches(sampler.step(progress.step), lengths, int(options.micro_batch_size))
            batches = [
                replace(renderer.batch([rows[i] for i in group], learn=True), places=torch.tensor(group)).to(device)
                for group in groups
            ]
            rate = learning_rate(
                progress.step,
                peak=1.0 if options.learning_rate is None else float(options.learning_rate),
                steps=steps,
                warmup=options.warmup,
                schedule=options.schedule,
            )
            result = method.step(batches, loss, rate)
            progress.step += 1
            progress.forwards += result.forwards
            progress.tokens += sum(b.tokens for b in batches)
            progress.seconds += time.perf_counter() - started
            for note in result.notes:
                progress.notes.append(note)
                on_event(Event("note", progress.step, {"text": note}))
            on_event(Event("step", progress.step, {"loss": result.loss, **result.scalars, "tokens": progress.tokens}))
    except (Interrupted, KeyboardInterrupt) as stop:
        if isinstance(stop, Interrupted) and saved < progress.step:
            save()
            saved = progress.step
        on_event(Event("stop", progress.step, {"saved": saved}))
        raise Interrupted(
            f"{str(stop) or 'Stopped.'} Steps up to {saved} are saved in {run.path}; --resume goes on."
        ) from None

    stopped_early = progress.step < steps
    if stopped_early:
        text = f"Stopped early after {progress.step:,} of {steps:,} steps: "
        text += f"dev was best at step {progress.best_step:,}, and train.patience is {options.patience}."
        on_event(Event("note", progress.step, {"text": text}))
    weights_from = progress.step
    if options.keep_best and progress.best_step is not None and progress.best_step != progress.step:
        try:
            best = load_step(run, progress.best_step)
        except RunError as damage:
            progress.notes.append(f"The last weights are kept, not the best: {damage}")
        else:
            method.load_learned(best.tensors["weights"])
            weights_from = progress.best_step
            if weights_from == 0:
                text = "No look at dev was better than the one before training, so the weights are those of the start. "
                text += "Try more steps, or another learning rate."
                progress.notes.append(text)
                on_event(Event("note", progress.step, {"text": text}))
    return TrainResult(progress, stopped_early, weights_from, tuple(progress.notes))


def _resume(loaded: Loaded, device: torch.device, method: Method) -> tuple[Progress, list[str]]:
    """Puts a checkpoint into the method. Raises RunError for one that another version has written in another form."""
    then = loaded.state["environment"]
    try:
        progress = Progress(**loaded.state["progress"])
        method.load_learned(loaded.tensors["weights"])
        method.load_state(loaded.tensors["method"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"A checkpoint must hold what this version goes on from. Received {loaded.path}, written in another form "
            f"by Tunefork {then['tunefork']} ({error}). Try the version that began the run, or a new run."
        ) from error
    if progress.step != loaded.step:
        raise RunError(f"A checkpoint's state must be of its own step. Received {progress.step} in step {loaded.step}.")
    return progress, environment_differences(then, environment(device, then["dtype"]))


def fingerprint_rows(rows: Sequence[Rendered]) -> str:
    """SHA-256 of every token of every row, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.ids, row.trained, row.candidates, row.example.gold)).encode())
    return digest.hexdigest()


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63
