"""Jobs that are trained, on the embedded model: results, checkpoints, stops, kills, and a database that is lost."""

from __future__ import annotations

import base64
import csv
import io
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.scenes import client_of, rows, server_process, serving, settings_in, wait_for
from tunefork.errors import MissingFileError
from tunefork.export.exporting import export
from tunefork.server import Settings, Store, create_key
from tunefork.server.models import resolve_model

QUICK = {"n_epochs": 1, "batch_size": 4}  # 3 steps
LONG = {"n_epochs": 10, "batch_size": 1}  # about 100 steps
SMALL = {"tunefork": {"adapter": {"rank": 4}}}


def create(client: openai.OpenAI, chosen: dict[str, int], **more: Any) -> str:
    file = client.files.create(file=("t.jsonl", rows(10)), purpose="fine-tune").id
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": chosen}}
    made = client.fine_tuning.jobs.create(
        model="fork-tiny", training_file=file, method=method, seed=1, extra_body=SMALL, **more
    )
    return made.id


def ended(client: openai.OpenAI, id: str, *statuses: str) -> Any:
    statuses = statuses or ("succeeded", "failed", "cancelled")
    wait_for(lambda: client.fine_tuning.jobs.retrieve(id).status in statuses)
    return client.fine_tuning.jobs.retrieve(id)


def messages(client: openai.OpenAI, id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(id, limit=1000)][::-1]


def weights(settings: Settings, id: str) -> bytes:
    return (settings.jobs_path / id / "run" / "model" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), slots=1)


@pytest.fixture(scope="module")
def keys(settings: Settings) -> list[str]:
    store = Store(settings)
    made = [create_key(store, project=name)[0] for name in ("proj_a", "proj_b")]
    store.close()
    return made


@pytest.fixture(scope="module")
def url(settings: Settings, keys: list[str]) -> Iterator[str]:
    with serving(settings) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str, keys: list[str]) -> openai.OpenAI:
    return client_of(url, keys[0])


@pytest.fixture(scope="module")
def done(client: openai.OpenAI) -> Any:
    valid = client.files.create(file=("v.jsonl", rows(3)), purpose="fine-tune").id
    return ended(client, create(client, QUICK, validation_file=valid, suffix="Colours"))


def test_a_finished_job_tells_what_it_did(client: openai.OpenAI, done: Any) -> None:
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model.startswith("ft:fork-tiny:tunefork:Colours:")
    assert done.trained_tokens > 0
    assert done.finished_at >= done.created_at
    said = messages(client, done.id)
    for text in (
        "Fine-tuning job started",
        "Checkpoint created at step 3",
        f"New fine-tuned model created: {done.fine_tuned_model}",
        "The job has successfully completed",
    ):
        assert text in said
    steps = [e for e in client.fine_tuning.jobs.list_events(done.id) if e.type == "metrics"]
    assert [e.data["step"] for e in steps] == [3, 2, 1]  # type: ignore[index]
    assert steps[0].message.startswith("Step 3/3: training loss=")
    leaked = [e for e in client.fine_tuning.jobs.list_events(done.id) if e.level == "warn"]
    assert [e.data for e in leaked] == [{"code": "few-rows"}, {"code": "leaked-exact"}]  # three rows, also in train


def test_the_result_file_is_base64_of_a_table(client: openai.OpenAI, done: Any) -> None:
    raw = client.files.content(done.result_files[0]).read()
    table = list(csv.DictReader(io.StringIO(base64.b64decode(raw, validate=True).decode())))
    assert list(table[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [row["step"] for row in table] == ["1", "2", "3"]
    assert float(table[2]["valid_loss"]) > 0
    assert table[0]["valid_loss"] == ""
    assert 0 <= float(table[0]["train_accuracy"]) <= float(table[2]["train_accuracy"]) <= 1
    assert 0 <= float(table[2]["valid_mean_token_accuracy"]) <= 1
    plain = client.files.content(done.result_files[0], extra_headers={"Accept": "text/csv"}).read()
    assert plain == base64.b64decode(raw)
    assert client.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"


def test_a_checkpoint_is_a_model_and_the_last_is_the_result(
    client: openai.OpenAI, done: Any, settings: Settings, url: str, keys: list[str]
) -> None:
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(done.id)
    assert checkpoint.step_number == 3
    assert checkpoint.metrics.full_valid_loss is not None
    assert checkpoint.metrics.full_valid_mean_token_accuracy is not None
    name = checkpoint.fine_tuned_model_checkpoint
    assert name == f"{done.fine_tuned_model}:ckpt-step-3"
    assert client.models.retrieve(name).id == name
    store = Store(settings, check=False)
    with store.read() as db:
        served = [resolve_model(db, settings, n, "proj_a") for n in (name, done.fine_tuned_model, "fork-tiny")]
    folders = [one.folder for one in served]
    assert folders[2] is None
    assert folders[0] is not None and folders[1] is not None
    for file in ("adapter_model.safetensors", "adapter_config.json", "tunefork.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()

    other = client_of(url, keys[1])
    with pytest.raises(openai.NotFoundError):
        other.models.retrieve(name)
    granted = client.fine_tuning.checkpoints.permissions.create(name, project_ids=["proj_b"])
    permission = next(iter(granted))
    assert other.models.retrieve(name).id == name
    with pytest.raises(openai.PermissionDeniedError):
        other.models.delete(name)
    with pytest.raises(openai.NotFoundError):  # shared is not owned
        other.fine_tuning.checkpoints.permissions.create(name, project_ids=["proj_c"])
    assert client.fine_tuning.checkpoints.permissions.delete(permission.id, fine_tuned_model_checkpoint=name).deleted
    with pytest.raises(openai.NotFoundError):
        other.models.retrieve(name)
    store.close()


def test_without_a_validation_file_every_row_is_trained_on(client: openai.OpenAI) -> None:
    job = ended(client, create(client, {"n_epochs": 1, "batch_size": 1}))
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    steps = [event.data for event in events if event.type == "metrics"]
    assert len(steps) == len(rows(10).splitlines())
    assert not [step for step in steps if "full_valid_loss" in step]  # type: ignore[operator]
    assert [event.message for event in events if event.level == "warn"] == []


@pytest.fixture(scope="module")
def alone(client: openai.OpenAI) -> Any:
    """A job that nothing disturbs."""
    return ended(client, create(client, LONG))


@pytest.mark.slow
def test_stopped_in_every_way_a_job_ends_with_the_same_weights(
    client: openai.OpenAI, settings: Settings, alone: Any
) -> None:
    """Paused and resumed once, its worker killed once."""
    id = create(client, LONG)
    wait_for(lambda: client.fine_tuning.jobs.checkpoints.list(id).data)
    assert client.fine_tuning.jobs.retrieve(id).estimated_finish is not None
    assert client.fine_tuning.jobs.pause(id).status == "running"  # until its step is saved
    ended(client, id, "paused")
    assert client.fine_tuning.jobs.resume(id).status == "queued"
    wait_for(lambda: len(client.fine_tuning.jobs.checkpoints.list(id).data) > 3)
    os.kill(worker_of(id), signal.SIGKILL)
    job = ended(client, id)
    assert job.status == "succeeded", job.error
    said = messages(client, id)
    assert "The worker was ended by signal 9; the job goes on from its last checkpoint" in said
    assert sum(text.startswith("Fine-tuning job goes on from step") for text in said) == 2
    steps = [text.split("/")[0] for text in said if text.startswith("Step ")]
    assert steps == [f"Step {n}" for n in range(1, len(steps) + 1)]
    assert weights(settings, id) == weights(settings, alone.id)
    assert job.trained_tokens == alone.trained_tokens


@pytest.mark.slow
def test_a_cancelled_job_stops(client: openai.OpenAI) -> None:
    id = create(client, LONG)
    wait_for(lambda: messages(client, id)[-1].startswith("Step"))
    pid = worker_of(id)
    assert client.fine_tuning.jobs.cancel(id).status == "cancelled"
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert client.fine_tuning.jobs.retrieve(id).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(id).result_files == []


@pytest.mark.slow
@pytest.mark.parametrize("validated", [False, True])
def test_a_model_can_be_taken_out_merged(tmp_path: Path, validated: bool) -> None:
    """As docs/server.md says it: the server is stopped, and the rows are put back."""
    mine = settings_in(tmp_path / "data", slots=1)
    with serving(mine) as url:
        client = client_of(url)
        files = {"validation_file": client.files.create(file=("v.jsonl", rows(3)), purpose="fine-tune").id}
        job = ended(client, create(client, QUICK, **(files if validated else {})))
    folder = mine.jobs_path / job.id
    for file in folder.glob("*.jsonl"):
        file.unlink()  # as the server does in a while
    with pytest.raises(MissingFileError):
        export(folder / "run", out=tmp_path / "out", device="cpu")
    (folder / ("valid.jsonl" if validated else "train.jsonl")).write_bytes(rows(3 if validated else 10))
    assert export(folder / "run", out=tmp_path / "out", device="cpu").proof is not None
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_can_be_deleted(client: openai.OpenAI, done: Any, settings: Settings) -> None:
    name = done.fine_tuned_model
    assert name in [model.id for model in client.models.list()]
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve(name)
    assert not (settings.jobs_path / done.id / "run" / "model").exists()


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_and_a_lost_database_is_rebuilt(
    tmp_path: Path, alone: Any, settings: Settings
) -> None:
    mine = settings_in(tmp_path / "data")
    with server_process(mine.data) as (process, url):
        client = client_of(url)
        id = create(client, LONG, metadata={"kept": "yes"})
        waiting = create(client, QUICK)
        cancelled = create(client, QUICK)
        client.fine_tuning.jobs.cancel(cancelled)
        wait_for(lambda: client.fine_tuning.jobs.checkpoints.list(id).data)
        process.kill()
    with server_process(mine.data) as (process, url):
        client = client_of(url)
        assert client.fine_tuning.jobs.retrieve(id).status in ("queued", "running")
        first = client.fine_tuning.jobs.checkpoints.list(id).data[0].step_number
        wait_for(lambda: client.fine_tuning.jobs.checkpoints.list(id).data[0].step_number > first)
        process.kill()
    damaged = bytearray(mine.database_path.read_bytes())
    damaged[4096:] = os.urandom(len(damaged) - 4096)
    mine.database_path.write_bytes(damaged)
    with server_process(mine.data) as (process, _):
        assert process.wait() != 0
    with server_process(mine.data, "--recover") as (_, url):
        client = client_of(url)
        assert client.fine_tuning.jobs.retrieve(cancelled).status == "cancelled"
        job = ended(client, id)
        assert (job.status, job.metadata) == ("succeeded", {"kept": "yes"})
        assert ended(client, waiting).status == "succeeded"
        newest = client.fine_tuning.jobs.checkpoints.list(id).data[0]
        assert newest.step_number == job.model_extra["tunefork"]["step"] == alone.model_extra["tunefork"]["step"]
        assert client.files.content(job.training_file).read() == rows(10)
        assert len(client.fine_tuning.jobs.list().data) == 3
    assert weights(mine, id) == weights(settings, alone.id)


def worker_of(id: str) -> int:
    """The process that trains a job."""
    found = subprocess.run(["pgrep", "-f", f"tunefork.server.worker {id}"], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])
