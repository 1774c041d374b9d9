"""/v1/fine_tuning/checkpoints/…/permissions: tuned models that other projects may use."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Security
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunefork.server.auth import Caller, allowed
from tunefork.server.jobs.requests import Body
from tunefork.server.jobs.show import show_permission
from tunefork.server.problems import model_not_found, not_found
from tunefork.server.routes.paging import page
from tunefork.server.state import Server, server_of
from tunefork.server.store import Model, Permission, new_id

router = APIRouter(prefix="/v1/fine_tuning/checkpoints/{checkpoint}/permissions")
Reader = Annotated[Caller, Security(allowed, scopes=["api.fine_tuning.checkpoints.read"])]
Writer = Annotated[Caller, Security(allowed, scopes=["api.fine_tuning.checkpoints.write"])]
ServerOf = Annotated[Server, Depends(server_of)]


class Grant(Body):
    project_ids: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=100)]


@router.post("")
def create_permissions(checkpoint: str, body: Grant, caller: Writer, server: ServerOf) -> dict[str, Any]:
    """One for each project; a project that has one keeps it."""
    with server.store.write() as db:
        model = _owned(db, checkpoint, caller)
        held = {p.project_id: p for p in db.scalars(select(Permission).where(Permission.model == model.name))}
        for project in body.project_ids:
            if project not in held:
                held[project] = Permission(id=new_id("cp_"), model=model.name, project_id=project)
                db.add(held[project])
        db.flush()
        data = [show_permission(held[project]) for project in dict.fromkeys(body.project_ids)]
    edges = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": False, **edges}


@router.get("")
def list_permissions(
    checkpoint: str,
    caller: Reader,
    server: ServerOf,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0, le=1000)] = 10,
    order: Literal["ascending", "descending"] = "descending",
    project_id: str | None = None,
) -> dict[str, Any]:
    with server.store.read() as db:
        query = select(Permission).where(Permission.model == _owned(db, checkpoint, caller).name)
        if project_id:
            query = query.where(Permission.project_id == project_id)
        ascending = order == "ascending"
        return page(db, query, Permission, show_permission, after=after, limit=limit, ascending=ascending, edges=True)


@router.delete("/{permission_id}")
def delete_permission(checkpoint: str, permission_id: str, caller: Writer, server: ServerOf) -> dict[str, Any]:
    with server.store.write() as db:
        model = _owned(db, checkpoint, caller)
        row = db.scalar(select(Permission).where(Permission.id == permission_id, Permission.model == model.name))
        if row is None:
            raise not_found("Permission", permission_id, "permission_id")
        db.delete(row)
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}


def _owned(db: Session, name: str, caller: Caller) -> Model:
    row = db.scalar(select(Model).where(Model.name == name, Model.project_id == caller.project_id))
    if row is None:
        raise model_not_found(name)
    return row
