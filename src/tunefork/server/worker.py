"""Runs one job: `python -m tunefork.server.worker JOB`, started by the queue.

The settings and the attempt come as one line of JSON on stdin, which then stays open: when it closes, the server has
died, and the worker saves a checkpoint and ends. Everything it tells the store is refused once the job is no longer
running this attempt, so that a worker that was given up writes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from tunefork.errors import DataError, Interrupted, RunError, TuneforkError
from tunefork.files import FolderLock, folder_damage
from tunefork.models import inspect_model
from tunefork.recipe import Recipe, TaskSection, load_recipe
from tunefork.run import RunFolder
from tunefork.server.blobs import write_blob
from tunefork.server.jobs.artefacts import write_checkpoint
from tunefork.server.jobs.keep import job_folder, keep_row
from tunefork.server.jobs.queue import DISK_FULL
from tunefork.server.jobs.recipes import recipe_of
from tunefork.server.jobs.results import (
    Metrics,
    checkpoint_row,
    final_row,
    metrics_by_step,
    metrics_of,
    result_csv,
    step_folder,
)
from tunefork.server.jobs.states import FAILED, FINISHED, RUNNING, SUCCEEDED, move, tell
from tunefork.server.settings import Settings
from tunefork.server.store import Event, File, Job, Model, Store, disk_is_full, now
from tunefork.train.loop import Event as Happening
from tunefork.workflows import Listener, Plan, RunResult, finetune

_log = logging.getLogger("tunefork.server.worker")
_FLUSH_SECONDS = 1.0
_LOCK_SECONDS = 120.0
_WARNINGS = {"warning": "warn", "error": "error"}


class Reporter(Listener):
    """Tells the store what a run does. Steps are told in bundles; a checkpoint is told once it can be served."""

    def __init__(self, settings: Settings, store: Store, job: Job) -> None:
        self.store, self.job = store, job
        self.folder = job_folder(settings, job.id)
        self.run = RunFolder(self.folder / "run", None)
        self.resumed = self.run.recipe_path.exists()
        self.steps: list[tuple[int, dict[str, Any]]] = []  # not told yet; a look adds to the last one
        self.flushed = time.monotonic()
        self.first: tuple[int, float] | None = None
        self.total = 0
        with store.read() as db:
            told = db.scalar(select(func.max(Event.step)).where(Event.job_id == job.id))
            self.told = told or 0

    def plan(self, plan: Plan) -> None:
        self.prepared, self.total = plan.job, plan.job.resolved.steps
        with self.writing() as db:
            if not self.resumed:
                for finding in plan.job.findings:
                    if finding.level in _WARNINGS:
                        text = f"{finding.message} {finding.advice}".strip()
                        tell(db, self.job.id, text, _WARNINGS[finding.level], data={"code": finding.code})
        if self.resumed:  # what a killed worker had done, and not told
            for step, values in sorted(self.metrics().items()):
                self._step(step, values)
            for step in self.run.checkpoint_steps():
                if folder_damage(self.run.checkpoint_path(step)) is None:
                    self._checkpoint(step)

    def event(self, event: Happening) -> None:
        if event.kind == "step":
            if time.monotonic() - self.flushed > _FLUSH_SECONDS:
                self.flush()
            self.first = self.first or (event.step, time.monotonic())
            self._step(event.step, metrics_of("step", event.values))
        elif event.kind == "look" and self.job.validation_file:
            if self.steps and self.steps[-1][0] == event.step:
                self.steps[-1][1].update(metrics_of("look", event.values))
        elif event.kind == "checkpoint":
            self._checkpoint(event.step)

    def flush(self) -> None:
        """Tells the steps that wait, and when the job should end."""
        self.flushed = time.monotonic()
        if not self.steps:
            return
        waiting, self.steps = self.steps, []
        with self.writing() as db:
            for step, values in waiting:
                text = f"Step {step}/{self.total}: training loss={values.get('train_loss', float('nan')):.2f}"
                if "full_valid_loss" in values:
                    text += f", full validation loss={values['full_valid_loss']:.2f}"
                data = {"step": step, "total_steps": self.total, **values}
                tell(db, self.job.id, text, type="metrics", data=data, step=step)
            last = self.told = waiting[-1][0]
            db.execute(update(Job).where(Job.id == self.job.id).values(step=last, estimated_finish=self._finish(last)))

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction. Raises Interrupted where the job has ended, or another worker has it."""
        with self.store.write() as db:
            mine = select(Job.seq).where(Job.id == self.job.id, Job.attempt == self.job.attempt)
            if db.scalar(mine.where(Job.status.not_in(FINISHED)).with_for_update()) is None:
                raise Interrupted(f"The job {self.job.id} has ended, or another worker has it.")
            yield db

    def metrics(self) -> Metrics:
        """Of every step so far. Without a validation file nothing was validated that is the client's business."""
        found = metrics_by_step(self.run.path)
        if self.job.validation_file:
            return found
        return {step: {k: v for k, v in m.items() if not k.startswith("full_valid")} for step, m in found.items()}

    def _step(self, step: int, values: dict[str, Any]) -> None:
        if step > self.told:
            self.steps.append((step, values))

    def _finish(self, step: int) -> int | None:
        if self.first is None or step <= self.first[0]:
            return None
        a_step = (time.monotonic() - self.first[1]) / (step - self.first[0])
        return now() + round(a_step * (self.total - step))

    def _checkpoint(self, step: int) -> None:
        self.flush()
        folder = self.folder / step_folder(step)
        if not folder.exists():
            write_checkpoint(self.prepared, self.run, step, folder)
        with self.writing() as db:
            row = checkpoint_row(self.job, step, self.metrics())
            if db.scalar(select(Model.seq).where(Model.name == row.name)) is None:
                db.add(row)
                tell(db, self.job.id, f"Checkpoint created at step {step}")
            saved = {"saved_step": step, "deaths": 0}
            db.execute(update(Job).where(Job.id == self.job.id, Job.saved_step < step).values(saved))


def run_job(settings: Settings, store: Store, job: Job) -> None:
    """Trains, and takes the job to `succeeded` or `failed`.

    Raises Interrupted where it was stopped before the end, and what a full disk raises: the job can go on later.
    """
    _wait_for_former_worker(job_folder(settings, job.id) / "run")
    reporter = Reporter(settings, store, job)
    with reporter.writing() as db:
        again = f"Fine-tuning job goes on from step {job.saved_step}" if reporter.resumed else "Fine-tuning job started"
        tell(db, job.id, again)
    try:
        done = finetune(_recipe(settings, job, reporter), resume=reporter.resumed, listener=reporter)
    except Interrupted:
        raise
    except DataError as error:
        message = f"The job failed due to an invalid training file. {error}"
        _fail(settings, reporter, "invalid_training_file", message, "training_file")
    except TuneforkError as error:
        if disk_is_full(error):
            raise
        _fail(settings, reporter, "training_failed", str(error), None)
    except Exception as error:  # the edge of a worker: the traceback is in the run's error.log
        if disk_is_full(error):
            raise
        _log.exception("job %s failed", job.id)
        message = "The job failed due to an error of the server. Its operator finds more in the job's run folder."
        _fail(settings, reporter, "server_error", message, None)
    else:
        _succeed(settings, reporter, done)


def _recipe(settings: Settings, job: Job, reporter: Reporter) -> Recipe:
    if reporter.resumed:  # the run has its recipe; only its place and task are told again
        kept = load_recipe(reporter.run.recipe_path)
        return Recipe(task=TaskSection(name=kept.task.name), out=str(reporter.run.path))
    parameters = inspect_model(settings.catalogue.models[job.base]).parameters
    return recipe_of(job, settings, reporter.folder, parameters)


def _wait_for_former_worker(run: Path) -> None:
    """A worker whose server died may still be saving; the run is its own until it has ended."""
    if not run.is_dir():
        return None
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return FolderLock(run).release()
        except RunError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _succeed(settings: Settings, reporter: Reporter, done: RunResult) -> None:
    """Files, model and state in one transaction, after their content is on the disk."""
    job = reporter.job
    reporter.flush()
    content = result_csv(reporter.metrics())
    file = File(
        id=f"file-{job.id.removeprefix('ftjob-')}",  # of a job that is finished twice over, the same
        project_id=job.project_id,
        filename="step_metrics.csv",
        purpose="fine-tune-results",
        bytes=len(content),
        created_at=now(),
        expires_at=None,
    )
    write_blob(settings.blobs_path / file.id, [content], file)
    with reporter.writing() as db:
        tokens = _tokens(reporter)
        values = {"result_file": file.id, "trained_tokens": tokens, "step": done.result["steps"]}
        if not move(db, job.id, SUCCEEDED, attempt=job.attempt, **values):
            raise Interrupted(f"The job {job.id} is paused.")
        db.add_all([file, final_row(job)])
        tell(db, job.id, f"New fine-tuned model created: {job.model_name}")
        tell(db, job.id, "The job has successfully completed")
        keep_row(settings, _fresh(db, job))


def _tokens(reporter: Reporter) -> int:
    """Of all steps; a run that had ended before this worker came tells them in its log."""
    steps = [entry for entry in reporter.run.read_log() if entry["kind"] == "step"]
    return int(steps[-1]["tokens"]) if steps else 0


def _fail(settings: Settings, reporter: Reporter, code: str, message: str, param: str | None) -> None:
    job = reporter.job
    reporter.flush()
    with reporter.writing() as db:
        error = {"code": code, "message": message, "param": param}
        if move(db, job.id, FAILED, attempt=job.attempt, error=error):
            tell(db, job.id, message, "error")
            keep_row(settings, _fresh(db, job))


def _fresh(db: Session, job: Job) -> Job:
    return db.scalars(select(Job).where(Job.id == job.id).execution_options(populate_existing=True)).one()


def _end_with_server() -> None:
    """Waits for stdin to close, then asks this process to stop, as Ctrl-C would."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_server, daemon=True).start()
    settings = Settings.model_validate(order["settings"])
    store = Store(settings, check=False)
    try:
        with store.read() as db:
            query = select(Job).where(Job.id == sys.argv[1], Job.attempt == order["attempt"], Job.status == RUNNING)
            job = db.scalar(query)
        if job is not None:
            run_job(settings, store, job)
    except Interrupted as stop:
        _log.info("job %s: %s", sys.argv[1], stop)
    except (TuneforkError, OSError, SQLAlchemyError) as error:
        if not disk_is_full(error):
            raise
        _log.error("job %s: %s", sys.argv[1], error)
        return DISK_FULL
    return 0


if __name__ == "__main__":
    sys.exit(main())
