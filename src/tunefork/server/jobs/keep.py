"""A job's folder: what it is trained on, its run, its models, and its row, from which `--recover` reads it back.

train.jsonl, valid.jsonl   links to the content of its files, until it has ended
job.json                   the row
run/                       the run
models/                    checkpoints (`step-00000120`), ready to be served; the result is the run's own model
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import inspect, select

from tunefork.errors import RunError
from tunefork.files import make_folder, write_json
from tunefork.server.blobs import ROW, row_values
from tunefork.server.jobs.results import FINAL, checkpoint_row, final_row, metrics_by_step
from tunefork.server.jobs.states import QUEUED, RUNNING, SUCCEEDED, tell
from tunefork.server.settings import Settings
from tunefork.server.store import File, Job, Row, Store, now

R = TypeVar("R", bound=Row)
KEPT, TRAIN, VALID = "job.json", "train.jsonl", "valid.jsonl"


def job_folder(settings: Settings, id: str) -> Path:
    return settings.jobs_path / id


def keep_row(settings: Settings, row: Job) -> None:
    """Writes the row into the job's folder; called in the transaction that changes it."""
    folder = job_folder(settings, row.id)
    make_folder(folder)
    write_json(folder / KEPT, row_values(row))


def set_aside(settings: Settings) -> Path | None:
    """Renames the database, and what belongs to it, so that a new one can be built; returns its new name."""
    path = settings.database_path
    aside = path.with_name(f"{path.name}.{now()}.damaged")
    for ending in ("", "-wal", "-shm"):
        part = path.with_name(path.name + ending)
        if part.exists():
            part.rename(aside.with_name(aside.name + ending))
    return aside if aside.exists() else None


def recover(settings: Settings, store: Store) -> dict[str, int]:
    """Fills an empty store from the folders of files and jobs; returns how many of each there are.

    A job that was running or queued is queued again and goes on from its last checkpoint. Events are lost but for
    metrics, which the run has in its log; so are API keys. Raises RunError where the store has jobs already.
    """
    with store.write() as db:
        if db.scalar(select(Job.seq).limit(1)) is not None:
            raise RunError("`--recover` needs a database without jobs. Received one that has some. Try without it.")
        files = [_row(File, path) for path in _sorted(settings.blobs_path, ROW)]
        jobs = [_row(Job, path) for path in _sorted(settings.jobs_path, KEPT)]
        db.add_all([*files, *jobs])
        db.flush()
        for job in jobs:
            if job.status == RUNNING:
                job.status = QUEUED
            tell(db, job.id, "The job was rebuilt from its folder; what it said before is lost", "warn")
            folder = job_folder(settings, job.id)
            metrics = metrics_by_step(folder / "run")
            for model in sorted((folder / "models").glob("step-*")):
                db.add(checkpoint_row(job, int(model.name.removeprefix("step-")), metrics))
            if job.status == SUCCEEDED and (folder / FINAL).is_dir():
                db.add(final_row(job))
    return {"files": len(files), "jobs": len(jobs)}


def _sorted(folder: Path, name: str) -> list[Path]:
    """Files `name` in the folders of `folder`, in the order their rows were made."""
    found = folder.glob(f"*/{name}") if folder.is_dir() else ()
    return sorted(found, key=lambda path: (_read(path)["created_at"], str(path)))


def _row(kind: type[R], path: Path) -> R:
    values = _read(path)
    if values["id"] != path.parent.name:
        raise RunError(f"{path} must be of {path.parent.name}. Received {values['id']}. Try moving that folder away.")
    names = [column.key for column in inspect(kind).column_attrs]
    return kind(**{name: values[name] for name in names if name in values})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
