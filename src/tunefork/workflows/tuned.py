"""What a hosted run has made: its job, its model, and how that is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.errors import RunError, UnsupportedError
from tunefork.files import write_json
from tunefork.hosted import HostedModel, find_model, is_hosted, jobs
from tunefork.hosted.client import Client
from tunefork.recipe import DataSection, HostedSection, Recipe, make_recipe
from tunefork.run import HOSTED_STATE, RunFolder
from tunefork.tasks import Task, make_task


@dataclass(frozen=True)
class TunedModel:
    """The model of a finished hosted run, with its task and the way rows are read and asked."""

    model: HostedModel
    task: Task
    data: DataSection  # layout, fields and labels as in training
    section: HostedSection


def open_tuned(path: str | Path) -> TunedModel | None:
    """The model that a hosted run made, ready to be asked; None for anything else. Raises RunError where unfinished."""
    name = tuned_model(path)
    if name is None:
        return None
    result = RunFolder.open(path, write=False).read_result()
    recipe = make_recipe(result["recipe"])
    data = DataSection(fields=recipe.data.fields, layout=recipe.data.layout, labels=recipe.data.labels)
    task = make_task(recipe.task, data, "causal", (), labels=result["labels"] or None)
    return TunedModel(find_model(name), task, data, recipe.hosted)


def require_local(recipe: Recipe, instead: str) -> None:
    """Raises UnsupportedError for a service's model, whose tokens and weights are not to be had; `instead` helps."""
    if is_hosted(recipe.model.name):
        raise UnsupportedError(f"The model must be one's own. Received {recipe.model.name!r}. Try {instead}.")


def cancel_hosted(path: str | Path) -> str:
    """Cancels the job of a run, which may be followed by another process meanwhile; returns its status."""
    state = read_state(Path(path))
    if state is None or state["job"] is None:
        raise RunError(f"{path} must be a run with a hosted job. Received none. Try the folder given as --out.")
    return str(jobs.cancel(Client(find_model(state["model"]).service), state["job"]["id"])["status"])


def read_state(path: Path) -> dict[str, Any] | None:
    """What hosted.json of a run says: model, run, files, job; None for a folder without one."""
    file = path / HOSTED_STATE
    return json.loads(file.read_bytes()) if file.is_file() else None


def tuned_model(path: str | Path) -> str | None:
    """The name of the model that a hosted run made; None for anything else."""
    state = None if is_hosted(str(path)) else read_state(Path(path))
    tuned = None if state is None else tuned_name(state)
    return None if state is None or tuned is None else find_model(state["model"]).sibling(tuned).name


def name_deployment(path: str | Path, name: str) -> None:
    """Says under which name the tuned model of a run answers, where the service gives it another than the job does."""
    with RunFolder.open(path, write=True) as run:
        state = read_state(run.path)
        job: dict[str, Any] = {} if state is None else state["job"] or {}
        if state is None or job.get("status") != "succeeded":
            raise RunError(f"{path} must be a run with a hosted job that succeeded. Received none. Try --resume first.")
        write_json(run.path / HOSTED_STATE, state | {"deployed": name})


def tuned_name(state: Mapping[str, Any]) -> str | None:
    """What the service calls the tuned model of a run with this hosted.json, so far as it is known."""
    job: dict[str, Any] = state["job"] or {}
    return state.get("deployed") or job.get("fine_tuned_model")
