"""What a server is started with: where its data lies, which models it offers, what it allows."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from tunefork.errors import MissingFileError, RecipeError
from tunefork.recipe import ModelSection

EMBEDDED = "fork-tiny"
_MB = 2**20

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""Part of `ft:base:org:suffix:id`, so it has no colon and no slash."""


def _section(value: Any) -> Any:
    """`name: folder` is short for `name: {name: folder}`."""
    return {"name": value} if isinstance(value, str) else value


class Catalogue(BaseModel):
    """models.yaml: what each base is (a folder, a hub name, or a recipe's `model` section), and other names for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: dict[Name, Annotated[ModelSection, BeforeValidator(_section)]] = {EMBEDDED: ModelSection()}
    aliases: dict[Name, Name] = {}

    @model_validator(mode="after")
    def _aliases_lead_somewhere(self) -> Catalogue:
        for alias, base in self.aliases.items():
            if alias in self.models or base not in self.models:
                raise ValueError(f"alias `{alias}` must be a new name for one of {', '.join(self.models)}")
        return self

    def base_of(self, name: str) -> str | None:
        """The base that `name` means, by its own name or by an alias; None when there is none."""
        name = self.aliases.get(name, name)
        return name if name in self.models else None


class Settings(BaseModel):
    """A server. Sizes are bytes, times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    database: str | None = Field(default=None, description="SQLAlchemy URL; a sqlite file in `data` when absent")
    organization: Name = "tunefork"
    catalogue: Catalogue = Catalogue()

    slots: int = Field(default=1, ge=0, description="jobs that train at the same time")
    max_deaths: int = Field(default=3, ge=1, description="deaths of a worker without a new checkpoint before failing")
    bases_in_memory: int = Field(default=2, ge=1, description="bases, and whole tuned models, that answer")
    adapters_in_memory: int = Field(default=32, ge=1, description="over each base")
    batch_rows: int = Field(default=32, ge=1, description="answers that are computed together")
    waiting_rows: int = Field(default=1024, ge=1, description="answers that may wait; more are refused with 503")

    json_bytes: int = Field(default=32 * _MB, ge=1, description="longest body of a request that is no upload")
    file_bytes: int = Field(default=512 * _MB, ge=1)
    part_bytes: int = Field(default=64 * _MB, ge=1)
    upload_bytes: int = Field(default=8192 * _MB, ge=1)
    project_bytes: int = Field(default=102_400 * _MB, ge=1, description="all files and open uploads of one project")
    upload_seconds: int = Field(default=3600, ge=1, description="until an upload that is not completed expires")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.database_path}"

    @property
    def database_path(self) -> Path:
        return self.data / "tunefork.db"

    @property
    def blobs_path(self) -> Path:
        return self.data / "files"

    @property
    def parts_path(self) -> Path:
        return self.data / "uploads"

    @property
    def jobs_path(self) -> Path:
        return self.data / "jobs"


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def load_catalogue(path: Path) -> Catalogue:
    """Reads models.yaml. Raises MissingFileError, or RecipeError naming what is wrong in it."""
    if not path.is_file():
        raise MissingFileError(f"`--models` must name a YAML file. Received {str(path)!r}, which is not there.")
    try:
        return Catalogue.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except yaml.YAMLError as error:
        raise RecipeError(f"`--models` must be valid YAML. Received {str(path)!r}: {error}.") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(
            f"{str(path)!r} must map names to models. Received {wrong}. Try `models: {{name: folder}}`."
        ) from None
