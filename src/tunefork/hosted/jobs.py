"""Files and jobs of a service: found again by name, so that nothing is uploaded, begun or paid for twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunefork.hosted.client import Client
from tunefork.hosted.services import HostedModel

if TYPE_CHECKING:
    import openai

ENDED = ("succeeded", "failed", "cancelled")
_PAGE = 100


def list_jobs(client: Client) -> list[dict[str, Any]]:
    """Every fine-tuning job that the key can see, newest first."""
    return client.call(
        "The list of jobs", lambda api: [job.to_dict() for job in api.fine_tuning.jobs.list(limit=_PAGE)]
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


def upload(client: Client, filename: str, content: bytes) -> str:
    """The id of a training file of this name. A file that has it already is taken: names must say the content."""

    def find(api: openai.OpenAI) -> str | None:
        files = api.files.list(purpose="fine-tune", limit=1000)
        return next((file.id for file in files if file.filename == filename), None)

    def make(api: openai.OpenAI) -> str:
        return api.files.create(file=(filename, content), purpose="fine-tune").id

    return client.call(f"The upload of {filename}", lambda api: find(api) or make(api))


def begin(client: Client, training_file: str, **request: Any) -> dict[str, Any]:
    """The job that trains on a file, made unless there is one: a request that was cut off may have been heard."""

    def find(api: openai.OpenAI) -> dict[str, Any] | None:
        jobs = api.fine_tuning.jobs.list(limit=_PAGE)
        return next((job.to_dict() for job in jobs if job.training_file == training_file), None)

    def make(api: openai.OpenAI) -> dict[str, Any]:
        return api.fine_tuning.jobs.create(training_file=training_file, **request).to_dict()

    return client.call("A fine-tuning job", lambda api: find(api) or make(api))
