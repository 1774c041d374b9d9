"""/v1/uploads: a large file in parts that arrive in any order, in parallel."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.datastructures import UploadFile

from tunefork.server.auth import Caller
from tunefork.server.blobs import chunks_at, chunks_of, write_blob
from tunefork.server.problems import ApiError, not_found, shown
from tunefork.server.routes.files import (
    ExpiresAfter,
    ServerOf,
    Writer,
    clean_filename,
    require_room,
    save_file,
    show_file,
)
from tunefork.server.state import Server
from tunefork.server.store import File, Part, Upload, new_id, now

router = APIRouter(prefix="/v1/uploads")


class NewUpload(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    filename: str = Field(min_length=1)
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
    bytes: int = Field(ge=0)
    mime_type: str
    expires_after: ExpiresAfter | None = None


class Completion(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    part_ids: list[str]
    md5: str | None = None


def show_upload(row: Upload, file: File | None = None) -> dict[str, Any]:
    expired = row.status == "pending" and row.expires_at <= now()
    return {
        "id": row.id,
        "object": "upload",
        "bytes": row.bytes,
        "created_at": row.created_at,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "expired" if expired else row.status,
        "expires_at": row.expires_at,
        "file": show_file(file) if file else None,
    }


@router.post("")
def create_upload(body: NewUpload, caller: Writer, server: ServerOf) -> dict[str, Any]:
    settings = server.settings
    if body.bytes > settings.upload_bytes:
        message = f"An upload may hold {settings.upload_bytes} bytes. Received {body.bytes}."
        raise ApiError(message, param="bytes", code="integer_above_max_value")
    created = now()
    row = Upload(
        id=new_id("upload_"),
        project_id=caller.project_id,
        filename=clean_filename(body.filename),
        purpose=body.purpose,
        bytes=body.bytes,
        created_at=created,
        expires_at=created + settings.upload_seconds,
        file_seconds=body.expires_after.seconds if body.expires_after else None,
    )
    with server.store.write() as db:
        require_room(db, settings, caller.project_id, body.bytes)
        db.add(row)
    return show_upload(row)


@router.post("/{upload_id}/parts")
async def create_part(upload_id: str, request: Request, caller: Writer, server: ServerOf) -> dict[str, Any]:
    await run_in_threadpool(_require_pending, server, upload_id, caller)
    async with request.form(max_files=1, max_fields=1) as form:
        if unknown := next((name for name in form if name != "data"), None):
            raise ApiError(f"Unknown parameter: '{shown(unknown)}'.", param=shown(unknown), code="unknown_parameter")
        data = form.get("data")
        if not isinstance(data, UploadFile):
            raise ApiError("Missing required parameter: 'data'.", param="data", code="missing_required_parameter")
        return await run_in_threadpool(_keep_part, server, caller, upload_id, data)


def _keep_part(server: Server, caller: Caller, upload_id: str, data: UploadFile) -> dict[str, Any]:
    size = data.size or 0
    if size > server.settings.part_bytes:
        message = f"A part may hold {server.settings.part_bytes} bytes. Received {size}."
        raise ApiError(message, status=413, param="data", code="request_too_large")
    row = Part(id=new_id("part_"), upload_id=upload_id, bytes=size, created_at=now())
    write_blob(server.settings.parts_path / upload_id / row.id, chunks_of(data.file), row)
    with server.store.write() as db:  # again: it may have been completed or cancelled meanwhile
        upload = _pending(db, upload_id, caller)
        held = sum(db.scalars(select(Part.bytes).where(Part.upload_id == upload_id)))
        if held + size > upload.bytes:
            raise ApiError(
                f"The parts of an upload must hold no more than the {upload.bytes} bytes it was created with. "
                f"Received {size} beside {held}.",
                param="data",
            )
        db.add(row)
    return {"id": row.id, "object": "upload.part", "created_at": row.created_at, "upload_id": upload_id}


@router.post("/{upload_id}/complete")
def complete_upload(upload_id: str, body: Completion, caller: Writer, server: ServerOf) -> dict[str, Any]:
    with server.store.read() as db:
        upload = _pending(db, upload_id, caller)
        parts = {part.id: part for part in db.scalars(select(Part).where(Part.upload_id == upload_id))}
    if unknown := [id for id in body.part_ids if id not in parts]:
        raise not_found("Part", unknown[0], "part_ids")
    if len(set(body.part_ids)) < len(body.part_ids):
        raise ApiError("Every part may be named once. Received one twice.", param="part_ids", code="invalid_value")
    size = sum(parts[id].bytes for id in body.part_ids)
    if size != upload.bytes:
        raise ApiError(
            f"The parts must hold the {upload.bytes} bytes the upload was created with. Received {size}.",
            param="part_ids",
        )
    created = now()
    row = File(
        id=new_id("file-"),
        project_id=upload.project_id,
        filename=upload.filename,
        purpose=upload.purpose,
        bytes=size,
        created_at=created,
        expires_at=created + upload.file_seconds if upload.file_seconds else None,
    )
    done: list[Upload] = []
    folders = [server.settings.parts_path / upload_id / id for id in body.part_ids]
    try:
        chunks = _checked(chunks_at(folders), body.md5)
        save_file(server, row, chunks, lambda db: done.append(_move(db, upload_id, caller, "completed", row.id)))
    except FileNotFoundError:  # cancelled, or completed by another request, while this one was reading
        _require_pending(server, upload_id, caller)
        raise
    shutil.rmtree(server.settings.parts_path / upload_id, ignore_errors=True)
    return show_upload(done[0], row)


def _checked(chunks: Iterable[bytes], md5: str | None) -> Iterator[bytes]:
    """The same chunks. Raises ApiError after the last one if together they do not have the sum."""
    digest = hashlib.md5(usedforsecurity=False)
    for piece in chunks:
        digest.update(piece)
        yield piece
    if md5 is not None and digest.hexdigest() != md5.lower():
        raise ApiError("The content must have the MD5 sum that is given. Received another.", param="md5")


@router.post("/{upload_id}/cancel")
def cancel_upload(upload_id: str, caller: Writer, server: ServerOf) -> dict[str, Any]:
    with server.store.write() as db:
        row = _move(db, upload_id, caller, "cancelled", None)
    shutil.rmtree(server.settings.parts_path / upload_id, ignore_errors=True)
    return show_upload(row)


def _move(db: Session, id: str, caller: Caller, status: str, file_id: str | None) -> Upload:
    row = _pending(db, id, caller)
    row.status, row.file_id = status, file_id
    return row


def _pending(db: Session, id: str, caller: Caller) -> Upload:
    row = db.scalar(select(Upload).where(Upload.id == id, Upload.project_id == caller.project_id))
    if row is None:
        raise not_found("Upload", id, "upload_id")
    status = show_upload(row)["status"]
    if status != "pending":
        raise ApiError(f"An upload must be pending. Received {id}, which is {status}.", param="upload_id")
    return row


def _require_pending(server: Server, id: str, caller: Caller) -> None:
    with server.store.read() as db:
        _pending(db, id, caller)
