"""Servers whose database is a PostgreSQL: one alone, and two that share it and their folder."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.clients import promise
from tests.server.scenes import client_of, rows, server_process, serving, settings_in, wait_for
from tunefork.errors import RecipeError
from tunefork.server import Store
from tunefork.server.store import File, Job

CHOSEN = {"n_epochs": 8, "batch_size": 2}  # 40 steps, 8 checkpoints
ENDED = ("succeeded", "failed", "cancelled")


def create(client: openai.OpenAI) -> str:
    file = client.files.create(file=("t.jsonl", rows(10)), purpose="fine-tune").id
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": CHOSEN}}
    return client.fine_tuning.jobs.create(model="fork-tiny", training_file=file, method=method, seed=1).id


def said(client: openai.OpenAI, id: str) -> list[str]:
    """Oldest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(id, limit=100)][::-1]


def require_once(client: openai.OpenAI, id: str) -> None:
    """It succeeded, and every step was told once, in order."""
    job = client.fine_tuning.jobs.retrieve(id)
    assert (job.status, len(job.result_files)) == ("succeeded", 1), (job.error, said(client, id))
    told = said(client, id)
    assert told.count("The job has successfully completed") == 1
    assert [text.split("/")[0] for text in told if text.startswith("Step ")] == [f"Step {n}" for n in range(1, 41)]


@pytest.mark.slow
def test_the_promise_is_held_over_postgres(tmp_path: Path, new_postgres: Callable[[], str]) -> None:
    with server_process(tmp_path / "data", "--database", new_postgres()) as (_, url):
        promise.learn(client_of(url))
    assert not (tmp_path / "data" / "tunefork.db").exists()


@pytest.mark.slow
def test_two_servers_share_the_jobs_and_one_goes_on_where_the_other_was_killed(
    tmp_path: Path, new_postgres: Callable[[], str]
) -> None:
    database = new_postgres()
    with ExitStack() as stack:
        servers = [stack.enter_context(server_process(tmp_path / "data", "--database", database)) for _ in range(2)]
        first, second = (client_of(url) for _, url in servers)
        ids = [create(client) for client in (first, second, first)]
        assert {job.id for job in second.fine_tuning.jobs.list()} == set(ids)

        def running() -> list[str]:
            found = [job.id for job in first.fine_tuning.jobs.list() if job.status == "running"]
            return found if len(found) == 2 else []

        wait_for(running)  # each has one slot
        time.sleep(2)  # several looks at the queue
        assert sorted(children(process.pid) for process, _ in servers) == [1, 1]
        wait_for(lambda: all(first.fine_tuning.jobs.retrieve(id).status in ENDED for id in ids))
        for id in ids:
            require_once(second, id)
            assert said(second, id).count("Fine-tuning job started") == 1
            assert not any("goes on" in text for text in said(second, id))

        last = [create(second), create(second)]
        for id in last:
            wait_for(lambda id=id: second.fine_tuning.jobs.checkpoints.list(id).data)
        servers[0][0].kill()
        wait_for(lambda: all(second.fine_tuning.jobs.retrieve(id).status in ENDED for id in last))
        left = "The job was left without a worker; it goes on from its last checkpoint"
        assert sorted(said(second, id).count(left) for id in last) == [0, 1]
        for id in last:
            require_once(second, id)


def children(pid: int) -> int:
    """Workers of a server."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "worker"], capture_output=True, text=True, check=False)
    return len(found.stdout.split())


def test_a_job_is_held_by_one_server_until_it_lets_go_or_ends(tmp_path: Path, new_postgres: Callable[[], str]) -> None:
    settings = settings_in(tmp_path, database=new_postgres())
    one, other = Store(settings), Store(settings)

    def seen(store: Store) -> bool:
        with store.write() as db:
            return store.is_held(db, "ftjob-a")

    assert one.hold("ftjob-a")
    assert not other.hold("ftjob-a")
    assert other.hold("ftjob-b")
    assert seen(other) and seen(one)
    one.release("ftjob-a")
    assert not seen(other)
    assert one.hold("ftjob-a")
    one.close()
    assert not seen(other)
    other.close()


def test_writers_wait_for_each_other_and_readers_see_one_state(tmp_path: Path, new_postgres: Callable[[], str]) -> None:
    store = Store(settings_in(tmp_path, database=new_postgres()))

    def add(number: int) -> None:
        with store.write() as db:
            count = db.query(Job).count()
            time.sleep(0.01)
            row = Job(id=f"j{number}", project_id="p", key_id="k", base="b", asked_model="b", model_name=str(count))
            row.training_file, row.seed, row.method = "f", 0, {"type": "supervised", "hyperparameters": {}}
            db.add(row)

    with store.read() as db:
        assert db.query(Job).count() == 0
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(16)))  # a name that is taken would raise
        assert db.query(Job).count() == 0
    with store.read() as db:
        assert db.query(Job).count() == 16
    store.close()


def test_what_postgres_cannot_keep_is_refused_and_late_times_are_kept(
    tmp_path: Path, new_postgres: Callable[[], str]
) -> None:
    settings = settings_in(tmp_path, database=new_postgres())
    with serving(settings) as url:
        client = client_of(url)
        file = client.files.create(file=("t.jsonl", rows()), purpose="fine-tune").id
        for refused in (
            lambda: client.files.retrieve("\0"),
            lambda: client.fine_tuning.jobs.create(model="fork-tiny", training_file=file, suffix="\0"),
            lambda: client.files.list(purpose="\0"),
        ):
            with pytest.raises(openai.BadRequestError, match="no NUL character"):
                refused()
        store = Store(settings)
        with store.write() as db:
            db.query(File).update({"expires_at": 2**33})  # the year 2242
        store.close()
        assert client.files.retrieve(file).expires_at == 2**33


@pytest.mark.parametrize("url", ["sqlite:///other.db", "nothing at all", "oracledb5://x"])
def test_another_database_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(RecipeError, match="must be the URL of a PostgreSQL"):
        Store(settings_in(tmp_path, database=url))
