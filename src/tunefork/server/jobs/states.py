"""The states of a job, and the one way from each to the next."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from tunefork.server.store import Event, Job, new_id, now

VALIDATING, QUEUED, RUNNING, PAUSED = "validating_files", "queued", "running", "paused"
PAUSING = "pausing"  # shown as running, which it is until its worker has saved the last step
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
FINISHED = (SUCCEEDED, FAILED, CANCELLED)

_BEFORE: dict[str, tuple[str, ...]] = {  # state -> those it may be entered from
    VALIDATING: (PAUSED,),
    QUEUED: (VALIDATING, RUNNING, PAUSING, PAUSED),
    RUNNING: (QUEUED,),
    PAUSING: (RUNNING,),
    PAUSED: (VALIDATING, QUEUED, PAUSING),
    SUCCEEDED: (RUNNING, PAUSING),
    FAILED: (VALIDATING, QUEUED, RUNNING, PAUSING),
    CANCELLED: (VALIDATING, QUEUED, RUNNING, PAUSING, PAUSED),
}


def move(
    db: Session, id: str, status: str, *, attempt: int | None = None, since: str | None = None, **values: Any
) -> bool:
    """Takes a job to `status` with `values`, if its state (and, where given, attempt and state `since`) allows it.

    One UPDATE that names the states it may come from: of two that want the same job, one gets True.
    """
    query = update(Job).where(Job.id == id, Job.status.in_((since,) if since else _BEFORE[status]))
    if attempt is not None:
        query = query.where(Job.attempt == attempt)
    if status in FINISHED:
        values |= {"finished_at": now()}
    if status != RUNNING:
        values |= {"estimated_finish": None}
    moved: Any = db.execute(query.values(status=status, **values).execution_options(synchronize_session=False))
    return bool(moved.rowcount)


def tell(db: Session, id: str, message: str, level: str = "info", **values: Any) -> None:
    """Adds an event to a job."""
    db.add(Event(id=new_id("ftevent-"), job_id=id, level=level, message=message, **values))


def claim(db: Session, exclude: Collection[str] = ()) -> tuple[str, int] | None:
    """The next job that may run, moved to `running`: (id, attempt). None when there is none.

    Those in `exclude` wait: their former worker has not ended yet. Keys take turns: first the one with fewest jobs
    running, then the one whose last start is longest ago; of one key's jobs the oldest. Every start is told to
    be later than those before it, whatever the clock did.
    """
    running: dict[str, int] = dict(
        db.execute(select(Job.key_id, func.count()).where(Job.status == RUNNING).group_by(Job.key_id)).tuples().all()
    )
    started: dict[str, int | None] = dict(
        db.execute(select(Job.key_id, func.max(Job.started_at)).group_by(Job.key_id)).tuples().all()
    )
    waiting = db.execute(select(Job.id, Job.key_id, Job.attempt).where(Job.status == QUEUED).order_by(Job.seq)).all()
    last = max((time or 0 for time in started.values()), default=0)
    for row in sorted(waiting, key=lambda r: (running.get(r.key_id, 0), started[r.key_id] or 0)):
        if row.id not in exclude and move(db, row.id, RUNNING, attempt=row.attempt):
            values = {"attempt": row.attempt + 1, "started_at": max(now(), last + 1)}
            db.execute(update(Job).where(Job.id == row.id).values(values))
            return row.id, row.attempt + 1
    return None
