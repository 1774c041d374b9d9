"""What a job leaves: metrics by step, the table of them, and rows of its models."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunefork.run import RunFolder
from tunefork.server.store import Job, Model, new_id

FINAL = "run/model"
Metrics = dict[int, dict[str, float]]
"""step -> train_loss, train_mean_token_accuracy, full_valid_loss, full_valid_mean_token_accuracy, as far as known."""

_RIGHT = ("token_accuracy", "preference_accuracy")  # a task has one of the two
_NAMES = {  # kind of an entry of a run's log -> its values under OpenAI's names
    kind: {"loss": f"{start}_loss", **dict.fromkeys(_RIGHT, f"{start}_mean_token_accuracy")}
    for kind, start in {"step": "train", "look": "full_valid"}.items()
}
_COLUMNS = {  # column of the result file -> metric
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "full_valid_loss",
    "valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
}


def metrics_of(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one entry of a run's log, under OpenAI's names."""
    names = _NAMES.get(kind, {})
    return {names[k]: v for k, v in values.items() if k in names and isinstance(v, int | float) and math.isfinite(v)}


def metrics_by_step(run: Path) -> Metrics:
    """From a run's log; empty where there is none yet. A look before the first step is not OpenAI's."""
    found: Metrics = {}
    if not (run / "log.jsonl").is_file():
        return found
    for entry in RunFolder(run, None).read_log():
        if entry["kind"] in _NAMES and entry["step"]:
            found.setdefault(entry["step"], {}).update(metrics_of(entry["kind"], entry))
    return found


def result_csv(metrics: Metrics) -> bytes:
    """The result file: OpenAI's columns, one line a step, blank where nothing was measured; base64 of the CSV."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["step", *_COLUMNS])
    for step, values in sorted(metrics.items()):
        table.writerow([step, *[values.get(name, "") for name in _COLUMNS.values()]])
    return base64.b64encode(out.getvalue().encode())


def step_folder(step: int) -> str:
    """Where in the job's folder the model of a checkpoint lies."""
    return f"models/step-{step:08d}"


def checkpoint_row(job: Job, step: int, metrics: Metrics) -> Model:
    return Model(
        id=new_id("ftckpt_"),
        name=f"{job.model_name}:ckpt-step-{step}",
        project_id=job.project_id,
        job_id=job.id,
        base=job.base,
        folder=step_folder(step),
        step=step,
        metrics={"step": step, **metrics.get(step, {})},
    )


def final_row(job: Job) -> Model:
    return Model(
        id=new_id("model_"),
        name=job.model_name,
        project_id=job.project_id,
        job_id=job.id,
        base=job.base,
        folder=FINAL,
        step=None,
        metrics=None,
    )
