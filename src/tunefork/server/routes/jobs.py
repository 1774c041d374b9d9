"""/v1/fine_tuning/jobs: create, follow, stop and go on."""

from __future__ import annotations

import secrets
import shutil
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Security
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunefork.errors import RecipeError
from tunefork.server.auth import Caller, allowed
from tunefork.server.blobs import link_content
from tunefork.server.jobs.keep import TRAIN, VALID, keep_row
from tunefork.server.jobs.recipes import METHODS, check_extension
from tunefork.server.jobs.requests import NewJob
from tunefork.server.jobs.show import show_checkpoint, show_event, show_job
from tunefork.server.jobs.states import CANCELLED, PAUSED, PAUSING, QUEUED, RUNNING, VALIDATING, move, tell
from tunefork.server.models import tuned_name
from tunefork.server.problems import ApiError, model_not_found, shown
from tunefork.server.routes.files import find_file
from tunefork.server.routes.paging import page
from tunefork.server.state import Server, server_of
from tunefork.server.store import Event, Job, Model, new_id

router = APIRouter(prefix="/v1/fine_tuning/jobs")
Reader = Annotated[Caller, Security(allowed, scopes=["api.fine_tuning.jobs.read"])]
Writer = Annotated[Caller, Security(allowed, scopes=["api.fine_tuning.jobs.write"])]
ServerOf = Annotated[Server, Depends(server_of)]
_SAID = {"cancel": "The job was cancelled", "pause": "The job was asked to pause", "resume": "The job was resumed"}
Limit = Annotated[int, Query(ge=0, le=1000)]


@router.post("")
def create_job(body: NewJob, caller: Writer, server: ServerOf) -> dict[str, Any]:
    settings = server.settings
    base = _base(server, body.model)
    method = body.chosen_method()
    if method["type"] not in METHODS:
        message = f"The method '{method['type']}' is not available on this server. Available: {', '.join(METHODS)}."
        raise ApiError(message, param="method", code="unsupported_method")
    extension = body.tunefork.model_dump() if body.tunefork else None
    try:
        problem = check_extension(extension, method["type"])
    except RecipeError as error:
        problem = str(error)
    if problem:
        raise ApiError(problem, param="tunefork", code="invalid_value")
    row = Job(
        id=new_id("ftjob-"),
        project_id=caller.project_id,
        key_id=caller.key_id,
        status=VALIDATING,
        base=base,
        asked_model=body.model,
        model_name=tuned_name(settings, base, body.suffix, new_id("", 8)),
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        method=method,
        integrations=[i.model_dump() for i in body.integrations] if body.integrations else None,
        meta=body.metadata,
        extension=extension,
    )
    with server.store.read() as db:
        _require_file(db, body.training_file, "training_file", caller)
        if body.validation_file is not None:
            _require_file(db, body.validation_file, "validation_file", caller)
    try:
        _add(server, row)
    except BaseException:
        shutil.rmtree(settings.jobs_path / row.id, ignore_errors=True)
        raise
    server.queue.wake()
    return show_job(row, settings)


def _add(server: Server, row: Job) -> None:
    """Gives the job its files, whoever deletes them later, then its row, which is also kept in its folder."""
    settings = server.settings
    folder = settings.jobs_path / row.id
    link_content(settings.blobs_path / row.training_file, folder / TRAIN)
    files = f"Validating training file: {row.training_file}"
    if row.validation_file:
        link_content(settings.blobs_path / row.validation_file, folder / VALID)
        files += f" and validation file: {row.validation_file}"
    with server.store.write() as db:
        db.add(row)
        db.flush()
        tell(db, row.id, f"Created fine-tuning job: {row.id}")
        tell(db, row.id, files)
        if row.integrations:
            tell(db, row.id, "Integrations are kept with the job; metrics are sent nowhere. Read its events.", "warn")
        keep_row(settings, row)  # before the row is there: a job that is acknowledged can be recovered


def _base(server: Server, name: str) -> str:
    base = server.settings.catalogue.base_of(name)
    if base is None and name.startswith("ft:"):
        message = "A fine-tuned model cannot be fine-tuned again here. Try its base model with both files in one."
        raise ApiError(message, param="model", code="model_not_available")
    if base is None:
        raise model_not_found(name)
    return base


def _require_file(db: Session, id: str, param: str, caller: Caller) -> None:
    row = find_file(db, id, caller.project_id)
    if row is None:
        raise ApiError(f"No such File object: {shown(id)}", param=param, code="invalid_file")
    if row.purpose != "fine-tune":
        message = f"File '{row.id}' must have the purpose 'fine-tune'. Received '{row.purpose}'."
        raise ApiError(message, param=param, code="invalid_file_purpose")


@router.get("")
def list_jobs(
    request: Request, caller: Reader, server: ServerOf, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """`metadata[k]=v` keeps jobs that have every such pair, `metadata=null` those that have none."""
    query = select(Job).where(Job.project_id == caller.project_id)
    for name, value in request.query_params.multi_items():
        if name == "metadata":
            if value != "null":
                message = "Invalid 'metadata': jobs are filtered by metadata[key]=value, or by metadata=null."
                raise ApiError(message, param="metadata", code="invalid_value")
            query = query.where(Job.meta.is_(None))
        elif name.startswith("metadata[") and name.endswith("]"):
            key = name[len("metadata[") : -1]
            if not key or '"' in key or "\\" in key:  # sqlite has no way to write those two in a path
                message = "A key to filter by must have a character, and no quotes and no backslashes."
                raise ApiError(message, param="metadata", code="invalid_value")
            query = query.where(Job.meta[key].as_string() == value)
    with server.store.read() as db:
        return page(db, query, Job, lambda row: show_job(row, server.settings), after=after, limit=limit)


@router.get("/{job_id}")
def retrieve_job(job_id: str, caller: Reader, server: ServerOf) -> dict[str, Any]:
    with server.store.read() as db:
        return show_job(_found(db, job_id, caller), server.settings)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, caller: Writer, server: ServerOf) -> dict[str, Any]:
    return _steer(server, caller, job_id, "cancel", {CANCELLED: CANCELLED}, CANCELLED)


@router.post("/{job_id}/pause")
def pause_job(job_id: str, caller: Writer, server: ServerOf) -> dict[str, Any]:
    """A job that runs stays `running` until its current step is done and saved; any other is `paused` at once."""
    return _steer(server, caller, job_id, "pause", {RUNNING: PAUSING, PAUSING: PAUSING, PAUSED: PAUSED}, PAUSED)


@router.post("/{job_id}/resume")
def resume_job(job_id: str, caller: Writer, server: ServerOf) -> dict[str, Any]:
    """A paused job goes back into the queue; to be validated first, if it was paused before that."""
    with server.store.read() as db:
        validated = _found(db, job_id, caller).layout is not None
    there = {state: state for state in (VALIDATING, QUEUED, RUNNING)}
    return _steer(server, caller, job_id, "resume", there, QUEUED if validated else VALIDATING)


def _steer(server: Server, caller: Caller, id: str, verb: str, special: dict[str, str], status: str) -> dict[str, Any]:
    """Moves a job to `status`, or where `special` says from its state; one that cannot go there is refused."""
    with server.store.write() as db:
        row = _found(db, id, caller)
        target = special.get(row.status, status)
        if row.status != target:
            if not move(db, id, target):
                refusal = f"Cannot {verb} a job that is {row.status}."
                raise ApiError(refusal, param="fine_tuning_job_id", code="invalid_job_state")
            tell(db, id, _SAID[verb])
            db.refresh(row)
            keep_row(server.settings, row)
    server.queue.wake()
    return show_job(row, server.settings)


@router.get("/{job_id}/events")
def list_events(
    job_id: str, caller: Reader, server: ServerOf, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    with server.store.read() as db:
        query = select(Event).where(Event.job_id == _found(db, job_id, caller).id)
        return page(db, query, Event, show_event, after=after, limit=limit)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, caller: Reader, server: ServerOf, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    with server.store.read() as db:
        query = select(Model).where(Model.job_id == _found(db, job_id, caller).id, Model.step.is_not(None))
        return page(db, query, Model, show_checkpoint, after=after, limit=limit, edges=True)


def _found(db: Session, id: str, caller: Caller) -> Job:
    row = db.scalar(select(Job).where(Job.id == id, Job.project_id == caller.project_id))
    if row is None:
        message = f"Could not find fine tune: {shown(id)}"
        raise ApiError(message, status=404, param="fine_tune_id", code="fine_tune_not_found")
    return row
