"""`migrate inventory`: which tuned models there are, what they were made of, and until when they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tunefork.files import make_folder, write_json
from tunefork.hosted.client import Client
from tunefork.hosted.jobs import list_jobs
from tunefork.hosted.services import HostedModel, find_service


@dataclass(frozen=True, slots=True)
class TunedModel:
    """A model that was tuned at a service, newest first in a list of them. Times are seconds since 1970."""

    model: str  # as --model takes it
    base: str
    answers: bool  # whether the service still lists it
    shutdown: str | None  # the day it stops answering, where one is known
    job: str | None
    created: int | None
    training_file: str | None
    validation_file: str | None
    trained_tokens: int | None


def inventory(service: str, out: str | Path | None = None, client: Client | None = None) -> list[TunedModel]:
    """Every tuned model that the key can see, by its job or in the list of models; written to `out` as JSON."""
    place = find_service(service)
    client = client or Client(place)
    models = client.call("The list of models", lambda api: [model.to_dict() for model in api.models.list()])
    listed: dict[str, Any] = {str(model["id"]): model for model in models}
    jobs = {job["fine_tuned_model"]: job for job in list_jobs(client) if job.get("fine_tuned_model")}
    separator = "#" if service.startswith("http") else ":"
    found = []
    for id in (*jobs, *(id for id in listed if id.startswith("ft:") and id not in jobs and ":ckpt-step-" not in id)):
        model, job = HostedModel(f"{service}{separator}{id}", place, id), jobs.get(id, {})
        found.append(
            TunedModel(
                model=model.name,
                base=job.get("model") or model.base,
                answers=id in listed,
                shutdown=listed.get(id, {}).get("shutdown_date") or shutdown_of(model),
                job=job.get("id"),
                created=job.get("created_at") or listed.get(id, {}).get("created"),
                training_file=job.get("training_file"),
                validation_file=job.get("validation_file"),
                trained_tokens=job.get("trained_tokens"),
            )
        )
    if out is not None:
        make_folder(Path(out).parent)
        write_json(Path(out), {"service": service, "dates": dates(), "models": [asdict(model) for model in found]})
    return found


def shutdown_of(model: HostedModel) -> str | None:
    """The day a model stops answering with its base, by the table; the longest name that fits counts."""
    known: Mapping[str, str] = _table()["models"].get(model.service.name, {})
    fitting = [name for name in known if model.base == name or model.base.startswith(f"{name}-20")]
    fitting += [name for name in known if name == "gpt-3.5-turbo" and model.base.startswith(name)]  # -0125 and others
    return known[max(fitting, key=len)] if fitting else None


def dates() -> dict[str, Any]:
    """When and where the table was read, and the last day of new jobs."""
    return {key: _table()[key] for key in ("date", "source", "no_new_jobs")}


def _table() -> dict[str, Any]:
    return yaml.safe_load((files("tunefork.migrate") / "shutdowns.yaml").read_text(encoding="utf-8"))
