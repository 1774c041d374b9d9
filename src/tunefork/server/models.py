"""What a model's name means: a base of the catalogue, a tuned model, or a checkpoint; checked for the project."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import exists, or_, select
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from tunefork.recipe import ModelSection
from tunefork.server.problems import model_not_found
from tunefork.server.settings import Settings
from tunefork.server.store import Model, Permission


@dataclass(frozen=True, slots=True)
class Served:
    """A model that a project may ask."""

    name: str  # as replies report it: never an alias
    base: str  # name in the catalogue
    section: ModelSection  # how the base is loaded
    folder: Path | None  # the artefact over it (adapter, or a whole model); None for the base itself


def tuned_name(settings: Settings, base: str, suffix: str | None, id: str) -> str:
    """`ft:base:org:suffix:id`, whatever the suffix holds; every part is safe in a path and in a URL."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", suffix or "").strip("-")
    return f"ft:{base}:{settings.organization}:{plain}:{id}"


def visible(project_id: str) -> ColumnElement[bool]:
    """Models of a project, and those that others share with it."""
    shared = exists().where(Permission.model == Model.name, Permission.project_id == project_id)
    return or_(Model.project_id == project_id, shared)


def find_model(db: Session, name: str, project_id: str) -> Model | None:
    return db.scalar(select(Model).where(Model.name == name, visible(project_id)))


def resolve_model(db: Session, settings: Settings, name: str, project_id: str) -> Served:
    """Raises ApiError (404) for a name that means nothing, or nothing this project may use."""
    base = settings.catalogue.base_of(name)
    if base is not None:
        return Served(base, base, settings.catalogue.models[base], None)
    row = find_model(db, name, project_id)
    if row is None or row.base not in settings.catalogue.models:
        raise model_not_found(name)
    return Served(row.name, row.base, settings.catalogue.models[row.base], model_folder(settings, row))


def model_folder(settings: Settings, row: Model) -> Path:
    return settings.jobs_path / row.job_id / row.folder
