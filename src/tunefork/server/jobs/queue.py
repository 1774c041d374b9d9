"""The queue: validates files, gives slots to jobs, watches their workers, and takes away what has expired."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from tunefork.errors import TuneforkError
from tunefork.server.blobs import remove_blob
from tunefork.server.jobs.keep import TRAIN, VALID, job_folder, keep_row
from tunefork.server.jobs.recipes import resolve_hyperparameters
from tunefork.server.jobs.states import (
    FAILED,
    FINISHED,
    PAUSED,
    PAUSING,
    QUEUED,
    RUNNING,
    VALIDATING,
    claim,
    move,
    tell,
)
from tunefork.server.jobs.validation import MIN_EXAMPLES, check_file
from tunefork.server.settings import Settings
from tunefork.server.store import ROOM, File, Job, Store, Upload, now

_log = logging.getLogger("tunefork.server.queue")
_TICK_SECONDS = 0.5
_SWEEP_SECONDS = 30.0
DISK_FULL = 28  # exit code of a worker
_STOP_SECONDS = 60.0  # a worker that is asked to stop has as long to finish its step and save it


@dataclass
class _Worker:
    process: subprocess.Popen[str]
    attempt: int
    stopped_at: float | None = None

    def stop(self) -> None:
        """Asks the process to save and end; one that does not is ended."""
        if self.stopped_at is None:
            self.stopped_at = time.monotonic()
            self.process.terminate()
        elif time.monotonic() - self.stopped_at > _STOP_SECONDS:
            self.process.kill()


class JobQueue:
    """One thread that moves jobs on. What it knows beyond the store is only which processes are its own."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.workers: dict[str, _Worker] = {}
        self._validating: set[str] = set()
        self._validators = ThreadPoolExecutor(1, "validate")
        self._wake, self._ending = threading.Event(), threading.Event()
        self._swept = 0.0
        self._thread = threading.Thread(target=self._loop, name="queue", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stops the workers, each with its last step saved, and the thread. Their jobs go on at the next start."""
        self._ending.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._validators.shutdown(wait=True, cancel_futures=True)
        while any(worker.process.poll() is None for worker in self.workers.values()):
            for worker in self.workers.values():
                worker.stop()
            time.sleep(0.05)

    def wake(self) -> None:
        self._wake.set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _loop(self) -> None:
        while not self._ending.is_set():
            try:
                self.tick()
            except (OSError, SQLAlchemyError, TuneforkError):  # a full disk or a locked database may pass
                _log.exception("the queue goes on after an error")
                time.sleep(_TICK_SECONDS)
            self._wake.wait(_TICK_SECONDS)
            self._wake.clear()

    def tick(self) -> None:
        """One look at everything."""
        self._reap()
        self._adopt()
        with self.store.read() as db:
            new = db.scalars(select(Job.id).where(Job.status == VALIDATING).order_by(Job.seq)).all()
        for id in new:
            if id not in self._validating:
                self._validating.add(id)
                self._validators.submit(self._validate, id).add_done_callback(
                    lambda done, id=id: self._checked(id, done)
                )
        while len(self.workers) < self.settings.slots and not self._ending.is_set() and self._has_room():
            with self.store.write() as db:
                claimed = claim(db, exclude=self.workers)
                if claimed and not self.store.hold(claimed[0]):
                    db.rollback()  # the server that had it has not let go of it yet
                    claimed = None
            if claimed is None:
                break
            self._start(*claimed)
        if time.monotonic() - self._swept > _SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._sweep()

    def _validate(self, id: str) -> None:
        with self.store.read() as db:
            job = db.scalars(select(Job).where(Job.id == id)).one()
        folder, kind = job_folder(self.settings, id), job.method["type"]
        report = check_file(folder / TRAIN, "training")
        error = report.error(job.training_file, kind, MIN_EXAMPLES)
        problems = report.problems
        if error is None and job.validation_file:
            valid = check_file(folder / VALID, "validation")
            error, problems = valid.error(job.validation_file, kind, 1), valid.problems
        with self.store.write() as db:
            if db.scalar(select(Job.status).where(Job.id == id)) != VALIDATING:
                return  # it was steered, or another server has validated it
            if error is not None:
                if move(db, id, FAILED, since=VALIDATING, error=error):
                    for problem in problems[1:]:
                        tell(db, id, problem, "error")
                    tell(db, id, error["message"], "error")
            else:
                chosen = resolve_hyperparameters(job.method["hyperparameters"], report.examples)
                method = {**job.method, "hyperparameters": chosen, "examples": report.examples}
                if move(db, id, QUEUED, since=VALIDATING, method=method, layout=report.layout):
                    tell(db, id, "Files validated, moving job to queued state")
            keep_row(self.settings, db.scalars(select(Job).where(Job.id == id)).one())

    def _checked(self, id: str, done: Future[None]) -> None:
        """A validation has ended; one that could not be made is tried again at a later tick."""
        self._validating.discard(id)
        if not done.cancelled() and (error := done.exception()) is not None:
            _log.error("validating %s", id, exc_info=error)
        else:
            self.wake()

    def _start(self, id: str, attempt: int) -> None:
        folder = job_folder(self.settings, id)
        try:
            with (folder / "worker.log").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tunefork.server.worker", id],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    start_new_session=True,  # Ctrl-C in the server's terminal reaches the server alone
                )
        except OSError as error:
            self._after(id, attempt, f"could not be started ({error.strerror})")
            return
        self.workers[id] = _Worker(process, attempt)
        assert process.stdin is not None
        order = {"settings": self.settings.model_dump(mode="json"), "attempt": attempt}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()

    def _reap(self) -> None:
        """Stops workers whose job is no longer theirs; of those that ended, retries or fails the job."""
        if not self.workers:
            return
        with self.store.read() as db:
            query = select(Job.id, Job.status, Job.attempt).where(Job.id.in_(self.workers))
            states = {row.id: (row.status, row.attempt) for row in db.execute(query)}
        for id, worker in list(self.workers.items()):
            code = worker.process.poll()
            if code is not None:
                assert worker.process.stdin is not None
                worker.process.stdin.close()
                self._after(id, worker.attempt, _how(code))  # where it raises, the next look is another try
                del self.workers[id]
                self.store.release(id)
            elif states.get(id) != (RUNNING, worker.attempt):
                worker.stop()

    def _adopt(self) -> None:
        """Jobs that ran under a server that has ended are queued again."""
        query = select(Job.id, Job.status).where(Job.status.in_((RUNNING, PAUSING)), Job.id.not_in(self.workers))
        with self.store.read() as db:
            left = db.execute(query).all()
        for id, status in left:
            with self.store.write() as db:
                if self.store.is_held(db, id):
                    continue
                if status == PAUSING:
                    _paused(db, id)
                elif move(db, id, QUEUED, since=status):
                    tell(db, id, "The job was left without a worker; it goes on from its last checkpoint", "warn")

    def _has_room(self) -> bool:
        """A job that cannot save what it learns would only begin again."""
        return shutil.disk_usage(self.settings.data).free > ROOM

    def _after(self, id: str, attempt: int, how: str) -> None:
        """A worker has ended: its job is paused now, if it was to be; if it is still running, the worker died."""
        with self.store.write() as db:
            job = db.scalars(select(Job).where(Job.id == id)).one()
            if job.attempt != attempt or job.status not in (RUNNING, PAUSING):
                return
            deaths = job.deaths + 1
            if job.status == PAUSING:
                _paused(db, id)
            elif deaths < self.settings.max_deaths:
                move(db, id, QUEUED, attempt=attempt, deaths=deaths)
                tell(db, id, f"The worker {how}; the job goes on from its last checkpoint", "warn")
            else:
                message = f"The worker {how}, {deaths} times in a row without reaching a new checkpoint."
                error = {"code": "worker_died", "message": message, "param": None}
                move(db, id, FAILED, attempt=attempt, error=error)
                tell(db, id, message, "error")
            db.refresh(job)
            keep_row(self.settings, job)

    def _sweep(self) -> None:
        """Deletes files that have expired, parts of uploads that are no longer pending, and what ended jobs read."""
        parts = self.settings.parts_path
        held = [folder.name for folder in parts.iterdir()] if parts.is_dir() else []  # before their rows are read
        with self.store.write() as db:
            expired = db.scalars(select(File.id).where(File.expires_at <= now())).all()
            db.execute(delete(File).where(File.id.in_(expired)))
            old = (Upload.status == "pending", Upload.expires_at <= now())
            db.execute(update(Upload).where(*old).values(status="expired"))
            pending = set(db.scalars(select(Upload.id).where(Upload.status == "pending")))
        for id in expired:
            remove_blob(self.settings.blobs_path / id)
        for name in set(held) - pending:
            shutil.rmtree(parts / name, ignore_errors=True)
        read = [path for name in (TRAIN, VALID) for path in self.settings.jobs_path.glob(f"*/{name}")]
        ended = select(Job.id).where(Job.status.in_(FINISHED), Job.id.not_in(self.workers))
        with self.store.read() as db:
            over = set(db.scalars(ended.where(Job.id.in_({path.parent.name for path in read}))))
        for path in read:
            if path.parent.name in over:
                path.unlink(missing_ok=True)


def _how(code: int) -> str:
    if code == DISK_FULL:
        return "found the disk full"
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _paused(db: Session, id: str) -> None:
    if move(db, id, PAUSED, since=PAUSING):
        tell(db, id, "The job is paused")
