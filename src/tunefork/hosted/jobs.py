"""Files and jobs of a service: found again by name, so that nothing is uploaded, begun or paid for twice."""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tunefork.errors import HostedError
from tunefork.hosted.client import Client
from tunefork.hosted.services import HostedModel

if TYPE_CHECKING:
    import openai

ENDED = ("succeeded", "failed", "cancelled")
_PAGE = 100


def list_jobs(client: Client) -> list[dict[str, Any]]:
    """Every fine-tuning job that the key can see, newest first."""
    return client.call(
        "The list of jobs", lambda api: [job.to_dict() for job in _each(api.fine_tuning.jobs.list(limit=_PAGE))]
    )


def find_job(client: Client, model: HostedModel) -> dict[str, Any] | None:
    """The job that made a tuned model (or a checkpoint of it); None where the key can see none."""
    if not model.is_tuned:
        return None
    name = model.id.partition(":ckpt-step-")[0]
    return next((job for job in list_jobs(client) if job.get("fine_tuned_model") == name), None)


def read_file(client: Client, id: str) -> bytes:
    """The content of a file."""
    return client.call(f"The file {id}", lambda api: api.files.content(id).read())


def upload(client: Client, filename: str, content: bytes, wait: Callable[[float], None]) -> str:
    """The id of a training file of this name. A file that has it already is taken: names must say the content.

    `wait` is called with seconds while the service still reads the file. Raises HostedError where it cannot.
    """

    def find(api: openai.OpenAI) -> dict[str, Any] | None:
        files = _each(api.files.list(purpose="fine-tune", limit=1000))
        return next((file.to_dict() for file in files if file.filename == filename), None)

    def make(api: openai.OpenAI) -> dict[str, Any]:
        return api.files.create(file=(filename, content), purpose="fine-tune").to_dict()

    file = client.call(f"The upload of {filename}", lambda api: find(api) or make(api))
    id = str(file["id"])
    while file.get("status") in ("pending", "running"):  # Azure refuses jobs on files that it is still reading
        wait(_pause(client))
        file = client.call(f"The file {id}", lambda api: api.files.retrieve(id).to_dict())
    if file.get("status") == "error":
        raise HostedError(
            f"A training file must be taken by {client.service.name}. Received, of {filename}: "
            f"{file.get('status_details') or 'no reason was given'}. Try a new run once that is mended."
        )
    return id


def begin(client: Client, training_file: str, model: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The job that trains `model` on a file, made unless there is one: a request that was cut off may have been heard.

    `request` has the other fields, also those that the official client does not know.
    """

    def find(api: openai.OpenAI) -> dict[str, Any] | None:
        jobs = _each(api.fine_tuning.jobs.list(limit=_PAGE))
        return next((job.to_dict() for job in jobs if job.training_file == training_file), None)

    def make(api: openai.OpenAI) -> dict[str, Any]:
        return api.fine_tuning.jobs.create(training_file=training_file, model=model, extra_body=request).to_dict()

    return client.call("A fine-tuning job", lambda api: find(api) or make(api))


def cancel(client: Client, id: str) -> dict[str, Any]:
    """The job, cancelled; or as it is, where it has ended already."""

    def send(api: openai.OpenAI) -> dict[str, Any]:
        job = api.fine_tuning.jobs.retrieve(id)
        return (job if job.status in ENDED else api.fine_tuning.jobs.cancel(id)).to_dict()

    return client.call(f"Cancelling {id}", send)


def follow(
    client: Client,
    id: str,
    seen: Collection[str],
    on_event: Callable[[Mapping[str, Any]], None],
    wait: Callable[[float], None],
) -> dict[str, Any]:
    """The job once it has ended; every event that is not in `seen` is told once, oldest first.

    `wait` is called with seconds between two looks, and may raise.
    """
    known = set(seen)
    while True:
        job = client.call(f"The job {id}", lambda api: api.fine_tuning.jobs.retrieve(id).to_dict())
        for event in client.call(f"The events of {id}", lambda api: list(_new_events(api, id, known))):
            known.add(event["id"])
            on_event(event)
        if job["status"] in ENDED:
            return job
        wait(_pause(client))


def checkpoints(client: Client, id: str) -> list[dict[str, Any]]:
    """Of a job, first to last; none where the service does not list them."""

    def send(api: openai.OpenAI) -> list[dict[str, Any]]:
        return [c.to_dict() for c in _each(api.fine_tuning.jobs.checkpoints.list(id, limit=_PAGE))]

    found = client.call(f"The checkpoints of {id}", send)
    return sorted(found, key=lambda checkpoint: checkpoint["step_number"])


def read_result_file(client: Client, id: str) -> bytes | None:
    """A result file as CSV, which services send as base64 or as it is; None for other files, such as weights."""
    if not client.call(f"The file {id}", lambda api: api.files.retrieve(id).filename).endswith(".csv"):
        return None
    content = read_file(client, id)
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error:
        return content


def metrics_by_step(table: bytes) -> list[dict[str, float]]:
    """The lines of a result file, their numbers under its column names."""
    rows = csv.DictReader(io.StringIO(table.decode("utf-8-sig")))
    return [{k: float(v) for k, v in row.items() if k and v} for row in rows]


def _pause(client: Client) -> float:
    """Seconds between two looks."""
    return 1.0 if client.service.is_local else 10.0


def _new_events(api: openai.OpenAI, id: str, known: Collection[str]) -> Iterator[dict[str, Any]]:
    """Oldest first; they are listed newest first, so a known one ends the search."""
    new = []
    for event in _each(api.fine_tuning.jobs.list_events(id, limit=_PAGE)):
        if event.id in known:
            break
        new.append(event.to_dict())
    return reversed(new)


def _each(pages: Iterable[Any]) -> Iterator[Any]:
    """All of a list, page by page; it ends where a service gives something again, which would have no end."""
    seen = set[str]()
    for item in pages:
        if item.id in seen:
            return
        seen.add(item.id)
        yield item
