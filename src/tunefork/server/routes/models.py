"""/v1/models: bases, and what was made of them here."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Security
from sqlalchemy import delete, select

from tunefork.server.auth import Caller, allowed
from tunefork.server.models import find_model, model_folder, visible
from tunefork.server.problems import ApiError, model_not_found
from tunefork.server.state import Server, server_of
from tunefork.server.store import Model

router = APIRouter(prefix="/v1/models")
Reader = Annotated[Caller, Security(allowed, scopes=["api.model.read"])]
Remover = Annotated[Caller, Security(allowed, scopes=["api.model.delete"])]
ServerOf = Annotated[Server, Depends(server_of)]


def show_model(row: Model, organization: str) -> dict[str, Any]:
    return _shown(row.name, row.created_at, f"org-{organization}", row.base)


def _shown(name: str, created: int, owner: str, base: str) -> dict[str, Any]:
    extension = {"base": base}
    return {"id": name, "object": "model", "created": created, "owned_by": owner, "tunefork": extension}


@router.get("")
def list_models(caller: Reader, server: ServerOf) -> dict[str, Any]:
    """Bases, their aliases, and finished models; checkpoints are listed with their job."""
    catalogue = server.settings.catalogue
    data = [_shown(name, 0, "system", name) for name in catalogue.models]
    data += [_shown(alias, 0, "system", base) for alias, base in catalogue.aliases.items()]
    with server.store.read() as db:
        query = select(Model).where(visible(caller.project_id), Model.step.is_(None)).order_by(Model.seq)
        data += [show_model(row, server.settings.organization) for row in db.scalars(query)]
    return {"object": "list", "data": data}


@router.get("/{model:path}")
def retrieve_model(model: str, caller: Reader, server: ServerOf) -> dict[str, Any]:
    base = server.settings.catalogue.base_of(model)
    if base is not None:
        return _shown(model, 0, "system", base)
    with server.store.read() as db:
        row = find_model(db, model, caller.project_id)
    if row is None:
        raise model_not_found(model)
    return show_model(row, server.settings.organization)


@router.delete("/{model:path}")
def delete_model(model: str, caller: Remover, server: ServerOf) -> dict[str, Any]:
    """Only by the project that made it. Its weights are deleted with it."""
    if server.settings.catalogue.base_of(model) is not None:
        message = f"The model {model} is not a fine-tuned model. Only those can be deleted."
        raise ApiError(message, status=403, param="model", code="forbidden")
    with server.store.write() as db:
        row = find_model(db, model, caller.project_id)
        if row is None:
            raise model_not_found(model)
        if row.project_id != caller.project_id:
            message = "A model can be deleted only by the project that made it."
            raise ApiError(message, status=403, param="model", code="forbidden")
        db.execute(delete(Model).where(Model.seq == row.seq))
    folder = model_folder(server.settings, row)
    server.engine.forget(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return {"id": row.name, "object": "model", "deleted": True}
