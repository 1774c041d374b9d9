"""`replay`: the trained model again, from its base and the trajectory of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tunefork.errors import RunError
from tunefork.export.rebuild import rebuild_artefact
from tunefork.files import make_folder, staged_folder
from tunefork.methods.zo import open_trajectory
from tunefork.run import RunFolder
from tunefork.train.checkpoint import load_step


@dataclass(frozen=True, slots=True)
class Replayed:
    """A rebuilt model: after which step of how many, from which step on they were done again, and how long it took.

    `torn_bytes` lie behind the last step: of one that was being written when the run, or the machine, stopped.
    """

    path: Path
    step: int
    steps: int
    from_step: int
    seconds: float
    torn_bytes: int


def replay(
    base: str | Path,
    trajectory: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Replayed:
    """Writes to `out` the model that a zeroth-order run had after `step` steps, bitwise as it was trained.

    Args:
        base: folder or hub name of the model that was trained.
        trajectory: a file, or the folder of a run or export that holds one. A run's checkpoints make the replay short.
        trust_remote_code: whether a base that brings its own Python code may run it.
        step: None: the step whose weights a finished run kept, else the last one.

    The folder is an artefact as a run's `model`: `evaluate`, `predict`, `chat` and plain PEFT load it.
    Raises MissingFileError or RunError where the trajectory is damaged, of another base, or ends before `step`;
    UnsupportedError where its base wants code of its own that is not asked for.
    """
    path, target, started = Path(trajectory), Path(out), time.perf_counter()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"A replay needs an empty folder. Received {target}, which is not. Try another --out.")
    path = path / "trajectory" if path.is_dir() else path
    reader = open_trajectory(path)
    run = RunFolder(path.parent, None)
    of_run = run.recipe_path.is_file() and run.log_path.is_file() and run.trajectory_path == path
    if step is None:
        kept = run.read_result()["train"]["weights_from_step"] if of_run and run.finished else None
        step = reader.steps if kept is None else int(kept)
    if not 0 <= step <= reader.steps:
        raise RunError(
            f"`step` must be from 0 to {reader.steps:,}, the steps that {path} has. Received {step:,}. Try without it."
        )
    before, learned = _nearest(run, step) if of_run else (0, None)
    terms = max(0, step - before) * reader.header.queries * reader.header.window
    said = f"replaying steps {before:,} to {step:,}: {terms:,} directions"
    make_folder(target.parent)
    with staged_folder(target) as folder:
        rebuild_artefact(
            reader,
            folder,
            base=str(base),
            step=step,
            learned=learned,
            device=device,
            trust_remote_code=trust_remote_code,
            on_begin=lambda: on_stage(said),
        )
    return Replayed(target, step, reader.steps, before, time.perf_counter() - started, reader.torn)


def _nearest(run: RunFolder, step: int) -> tuple[int, Mapping[str, torch.Tensor] | None]:
    """The last good checkpoint up to `step`: its step and weights."""
    for before in reversed([s for s in run.checkpoint_steps() if s <= step]):
        with suppress(RunError):  # a damaged one: the one before it does as well
            return before, load_step(run, before).tensors["weights"]
    return 0, None
