"""/v1/files: content that jobs read, and the tables they leave."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session
from starlette.datastructures import FormData, UploadFile

from tunefork.server.auth import Caller, allowed
from tunefork.server.blobs import CONTENT, chunks_of, remove_blob, write_blob
from tunefork.server.problems import ApiError, from_validation, not_found
from tunefork.server.routes.paging import page
from tunefork.server.settings import Settings
from tunefork.server.state import Server, server_of
from tunefork.server.store import File, Upload, new_id, now

router = APIRouter(prefix="/v1/files")
Reader = Annotated[Caller, Security(allowed, scopes=["api.files.read"])]
Writer = Annotated[Caller, Security(allowed, scopes=["api.files.write"])]
ServerOf = Annotated[Server, Depends(server_of)]

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
RESULTS = "fine-tune-results"


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid")
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class NewFile(BaseModel):
    """The fields of the form, beside the file."""

    model_config = ConfigDict(extra="forbid")
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


def show_file(row: File) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": row.created_at,
        **({"expires_at": row.expires_at} if row.expires_at is not None else {}),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
    }


def find_file(db: Session, id: str, project_id: str) -> File | None:
    """A file of this project that has not expired."""
    alive = or_(File.expires_at.is_(None), File.expires_at > now())
    return db.scalar(select(File).where(File.id == id, File.project_id == project_id, alive))


def clean_filename(name: str | None) -> str:
    """The last part of a name, without control characters; it is only ever shown, and names no path here."""
    last = PurePosixPath((name or "").replace("\\", "/")).name
    kept = "".join(c for c in last if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))
    return kept[:255] or "upload"


def require_room(db: Session, settings: Settings, project_id: str, more: int) -> None:
    """Raises ApiError where `more` bytes would be too many for the project, open uploads included."""
    held = select(func.sum(File.bytes)).where(File.project_id == project_id)
    promised = select(func.sum(Upload.bytes)).where(
        Upload.project_id == project_id, Upload.status == "pending", Upload.expires_at > now()
    )
    used = sum(int(db.scalar(query) or 0) for query in (held, promised))
    if used + more > settings.project_bytes:
        raise ApiError(
            f"The files of a project may hold {settings.project_bytes} bytes together. Received {more} more beside "
            f"{used}. Delete files, or open uploads, that are no longer needed.",
            code="storage_quota_exceeded",
        )


@router.post("")
async def create_file(request: Request, caller: Writer, server: ServerOf) -> dict[str, Any]:
    # The form is read here, not by the framework, so that the key is checked before the body.
    declared = int(request.headers.get("content-length") or 0)
    await run_in_threadpool(_refuse_without_room, server, caller, max(0, declared - 2**20))
    async with request.form(max_files=1, max_fields=16, max_part_size=4096) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError("Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
        return await run_in_threadpool(_keep, server, caller, _fields(form), file)


def _refuse_without_room(server: Server, caller: Caller, more: int) -> None:
    with server.store.read() as db:
        require_room(db, server.settings, caller.project_id, more)


def _fields(form: FormData) -> NewFile:
    """The form's fields; `expires_after[seconds]` is one inside `expires_after`."""
    tree: dict[str, Any] = {}
    for key, value in form.multi_items():
        outer, _, inner = key.removesuffix("]").partition("[")
        if key == "file":
            continue
        if inner:
            section = tree.setdefault(outer, {})
            if isinstance(section, dict):
                section[inner] = value
        else:
            tree[outer] = value
    try:
        return NewFile.model_validate(tree)
    except ValidationError as error:
        raise from_validation([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None


def _keep(server: Server, caller: Caller, fields: NewFile, file: UploadFile) -> dict[str, Any]:
    size, created = file.size or 0, now()
    if size > server.settings.file_bytes:
        message = f"A file may hold {server.settings.file_bytes} bytes. Received {size}. Use the Uploads API."
        raise ApiError(message, status=413, param="file", code="request_too_large")
    seconds = fields.expires_after.seconds if fields.expires_after else None
    row = File(
        id=new_id("file-"),
        project_id=caller.project_id,
        filename=clean_filename(file.filename),
        purpose=fields.purpose,
        bytes=size,
        created_at=created,
        expires_at=created + seconds if seconds else None,
    )
    save_file(server, row, chunks_of(file.file))
    return show_file(row)


def save_file(
    server: Server, row: File, chunks: Iterable[bytes], also: Callable[[Session], None] = lambda db: None
) -> None:
    """Writes the content, then, in one transaction, the row and what `also` does; neither is left without the other."""
    folder = server.settings.blobs_path / row.id
    write_blob(folder, chunks, row)
    try:
        with server.store.write() as db:
            also(db)
            require_room(db, server.settings, row.project_id, row.bytes)
            db.add(row)
    except BaseException:
        remove_blob(folder)
        raise


@router.get("")
def list_files(
    caller: Reader,
    server: ServerOf,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=0, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    query = select(File).where(
        File.project_id == caller.project_id, or_(File.expires_at.is_(None), File.expires_at > now())
    )
    if purpose:
        query = query.where(File.purpose == purpose)
    with server.store.read() as db:
        found = page(db, query, File, show_file, after=after, limit=limit, ascending=order == "asc", edges=True)
    return {**found, "first_id": found["first_id"] or "", "last_id": found["last_id"] or ""}


@router.get("/{file_id}")
def retrieve_file(file_id: str, caller: Reader, server: ServerOf) -> dict[str, Any]:
    return show_file(_found(server, file_id, caller))


@router.delete("/{file_id}")
def delete_file(file_id: str, caller: Writer, server: ServerOf) -> dict[str, Any]:
    with server.store.write() as db:
        row = find_file(db, file_id, caller.project_id)
        if row is None:
            raise not_found("File", file_id)
        db.delete(row)
    remove_blob(server.settings.blobs_path / row.id)
    return {"id": row.id, "object": "file", "deleted": True}


@router.get("/{file_id}/content", response_class=FileResponse)
def file_content(file_id: str, request: Request, caller: Reader, server: ServerOf) -> Response:
    """The bytes as they came. A job's result is base64 of its CSV, as from OpenAI, or plain for `Accept: text/csv`."""
    row = _found(server, file_id, caller)
    path = server.settings.blobs_path / row.id / CONTENT
    if row.purpose == RESULTS and "text/csv" in request.headers.get("accept", ""):
        return Response(base64.b64decode(path.read_bytes()), media_type="text/csv")
    return FileResponse(path, media_type="application/octet-stream", filename=row.filename)


def _found(server: Server, id: str, caller: Caller) -> File:
    with server.store.read() as db:
        row = find_file(db, id, caller.project_id)
    if row is None:
        raise not_found("File", id)
    return row
