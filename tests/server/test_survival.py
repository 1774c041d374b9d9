"""Kills at random instants, full disks, clocks that jump: no job is lost, none has two results, and every weight is the
one that undisturbed training gives."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy.exc import OperationalError

from tests.server.scenes import client_of, free_port, rows, server_answers, server_process, settings_in, wait_for
from tunefork.server import Settings, Store
from tunefork.server.store import Job

CHOSEN = {"n_epochs": 8, "batch_size": 2}  # 40 steps, 8 checkpoints
GONE = (openai.APIConnectionError, openai.InternalServerError)  # the server is not there, or not yet


def create(client: openai.OpenAI) -> tuple[str, str]:
    """Ids of a file and of a job on it: each acknowledged, so that it must not be lost."""
    file = client.files.create(file=("t.jsonl", rows(10)), purpose="fine-tune").id
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": CHOSEN}}
    small = {"tunefork": {"adapter": {"rank": 4}}}
    job = client.fine_tuning.jobs.create(model="fork-tiny", training_file=file, method=method, seed=1, extra_body=small)
    return file, job.id


def weights(settings: Settings, id: str) -> bytes:
    return (settings.jobs_path / id / "run" / "model" / "adapter_model.safetensors").read_bytes()


def require_whole(
    settings: Settings, client: openai.OpenAI, file: str, id: str, undisturbed: tuple[bytes, str]
) -> None:
    """The job has one result, which is that of `undisturbed`; its story has every step and every checkpoint once."""
    jobs = client.fine_tuning.jobs
    job = jobs.retrieve(id)
    assert job.status == "succeeded", (job.error, [e.message for e in jobs.list_events(id, limit=100)])
    assert weights(settings, id) == undisturbed[0]
    (result,) = job.result_files
    assert base64.b64decode(client.files.content(result).read()).decode() == undisturbed[1]
    assert [model.id for model in client.models.list()].count(job.fine_tuned_model or "") == 1
    assert [c.step_number for c in jobs.checkpoints.list(id)] == [40, 35, 30, 25, 20, 15, 10, 5]
    said = [event.message for event in jobs.list_events(id, limit=100)]
    assert said.count("The job has successfully completed") == 1
    steps = [text.split("/")[0] for text in said if text.startswith("Step ")]
    assert steps == [f"Step {n}" for n in range(40, 0, -1)]
    assert client.files.content(file).read() == rows(10)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """Weights, and the table of metrics, of a job that nothing happens to."""
    settings = settings_in(tmp_path_factory.mktemp("undisturbed") / "data")
    with server_process(settings.data) as (_, url):
        client = client_of(url)
        _, id = create(client)
        wait_for(lambda: client.fine_tuning.jobs.retrieve(id).status in ("succeeded", "failed"))
        (result,) = client.fine_tuning.jobs.retrieve(id).result_files
        return weights(settings, id), base64.b64decode(client.files.content(result).read()).decode()


class Siege:
    """A server that is killed and started again, while a client goes on making jobs, which it retries until they are
    acknowledged."""

    def __init__(self, folder: Path, count: int, chance: random.Random) -> None:
        self.settings, self.count, self.chance, self.port = settings_in(folder), count, chance, free_port()
        self.root = f"http://127.0.0.1:{self.port}"
        self.client = client_of(f"{self.root}/v1")
        self.made: list[tuple[str, str]] = []
        self.killed = {"server": 0, "worker": 0, "both": 0}
        self._maker = threading.Thread(target=self._make, daemon=True)

    def __enter__(self) -> Siege:
        self._start()
        self._maker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.terminate()
        self.server.wait()

    def _start(self) -> None:
        folder = str(self.settings.data)
        command = [
            sys.executable,
            "-m",
            "tunefork",
            "serve",
            "--data",
            folder,
            "--port",
            str(self.port),
            "--slots",
            "2",
        ]
        with (self.settings.data / "server.log").open("ab") as log:
            self.server = subprocess.Popen(command, stderr=log)

    def _make(self) -> None:
        while len(self.made) < self.count:
            with contextlib.suppress(*GONE):
                self.made.append(create(self.client))
            time.sleep(0.5)

    def kill(self) -> None:
        """Waits for a random instant, which may be in the middle of a start, and kills."""
        if self.chance.random() < 0.7:
            wait_for(lambda: self.server.poll() is not None or server_answers(f"{self.root}/readyz"))
        time.sleep(self.chance.uniform(0, 6))
        workers = self._workers()
        what = self.chance.choice(["server", "worker", "both"] if workers else ["server"])
        self.killed[what] += 1
        if what != "worker":
            self.server.kill()
            self.server.wait()
        if what != "server":
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(self.chance.choice(workers), signal.SIGKILL)
        if what != "worker":
            self._start()

    def _workers(self) -> list[int]:
        """Processes of jobs that may lose a worker once more: at the third loss in a row a job rightly fails."""
        found = subprocess.run(["pgrep", "-af", "tunefork.server.worker"], capture_output=True, text=True, check=False)
        lines = [line.split() for line in found.stdout.splitlines()]
        if not lines:
            return []
        store, sturdy = Store(self.settings, check=False), list[str]()
        with contextlib.suppress(OperationalError), store.read() as db:  # the server may have been killed before it
            sturdy = [job.id for job in db.query(Job) if job.deaths < 2]  # had tables
        store.close()
        return [int(words[0]) for words in lines if words[-1] in sturdy]

    def finished(self) -> bool:
        """Whether every job has ended; also those whose acknowledgement was lost on its way."""
        with contextlib.suppress(*GONE):
            jobs = list(self.client.fine_tuning.jobs.list())
            return len(self.made) == self.count and all(job.finished_at is not None for job in jobs)
        return False


@pytest.mark.parametrize(
    ("jobs", "kills", "seed"),
    [(1, 3, 0), *(pytest.param(4, 10, seed, marks=pytest.mark.slow) for seed in range(1, 6))],
)
def test_no_job_is_lost_to_a_kill_or_run_to_two_results(
    tmp_path: Path, undisturbed: tuple[bytes, str], jobs: int, kills: int, seed: int
) -> None:
    """All parts together: 53 kills during 21 jobs."""
    with Siege(tmp_path / "data", jobs, random.Random(seed)) as siege:
        for _ in range(kills):
            siege.kill()
        wait_for(siege.finished)
        print(f"killed {siege.killed}")
        for file, id in siege.made:
            require_whole(siege.settings, siege.client, file, id, undisturbed)
        listed = [job.id for job in siege.client.fine_tuning.jobs.list()]
        assert {id for _, id in siege.made} <= set(listed)
        for id in listed:  # each job has its own result, also one that nobody was told of
            assert siege.client.fine_tuning.jobs.retrieve(id).status == "succeeded"
            assert weights(siege.settings, id) == undisturbed[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_what_is_new_and_loses_nothing(
    small_disk: Path, undisturbed: tuple[bytes, str]
) -> None:
    settings = settings_in(small_disk / "data")
    with server_process(settings.data) as (process, url):
        client = client_of(url)
        jobs, root = client.fine_tuning.jobs, url.removesuffix("/v1")
        file, id = create(client)
        wait_for(lambda: jobs.checkpoints.list(id).data)
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as full, contextlib.suppress(OSError):
            while True:
                full.write(bytes(2**16) if full.tell() < 2**26 else bytes(512))
        wait_for(lambda: _no_worker(id))
        for refused in (
            lambda: client.files.create(file=b"x" * 10**4, purpose="user_data"),
            lambda: client.files.create(file=b"x" * 10**7, purpose="user_data"),
            lambda: jobs.create(model="fork-tiny", training_file=file),
        ):
            with pytest.raises(openai.InternalServerError) as error:
                refused()
            assert (error.value.status_code, error.value.code) == (507, "insufficient_storage")
        assert httpx.get(f"{root}/readyz").status_code == 503
        assert client.files.content(file).read() == rows(10)
        assert jobs.retrieve(id).status in ("queued", "running")
        filler.unlink()
        wait_for(lambda: jobs.retrieve(id).finished_at is not None)
        require_whole(settings, client, file, id, undisturbed)
        said = [event.message for event in jobs.list_events(id, limit=100)]
        assert "The worker found the disk full; the job goes on from its last checkpoint" in said
        assert httpx.get(f"{root}/readyz").status_code == 200
        assert [f.id for f in client.files.list(purpose="user_data")] == []
        assert process.poll() is None


def _no_worker(id: str) -> bool:
    found = subprocess.run(["pgrep", "-f", f"tunefork.server.worker {id}"], capture_output=True, check=False)
    return found.returncode != 0
