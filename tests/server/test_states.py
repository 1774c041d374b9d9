"""The state machine, and whose turn it is, on the store alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from tests.server.scenes import settings_in
from tunefork.server import Store
from tunefork.server.jobs.recipes import resolve_hyperparameters
from tunefork.server.jobs.states import FINISHED, QUEUED, RUNNING, claim, move
from tunefork.server.store import Job, new_id

STATES = ("validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled")


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    database = request.getfixturevalue("new_postgres")() if request.param == "postgres" else None
    store = Store(settings_in(tmp_path / "data", database=database))
    yield store
    store.close()


def add(store: Store, key: str = "key_a", status: str = QUEUED) -> str:
    id = new_id("ftjob-")
    row = Job(id=id, project_id="p", key_id=key, status=status, base="b", asked_model="b", model_name=id)
    row.training_file, row.seed, row.method = "f", 0, {"type": "supervised", "hyperparameters": {}}
    with store.write() as db:
        db.add(row)
    return id


def status(store: Store, id: str) -> str:
    with store.read() as db:
        return db.scalars(select(Job.status).where(Job.id == id)).one()


@given(path=st.lists(st.sampled_from(STATES), max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_finished_stays_so_and_success_needs_a_run(store: Store, path: list[str]) -> None:
    id, been = add(store, status="validating_files"), ["validating_files"]
    for wanted in path:
        with store.write() as db:
            moved = move(db, id, wanted)
        assert status(store, id) == (wanted if moved else been[-1])
        if moved:
            been.append(wanted)
    finished = [s for s in been if s in FINISHED]
    assert finished in ([], [been[-1]])
    if "succeeded" in been:
        assert been[-2] in (RUNNING, "pausing")
    for before, after in itertools.pairwise(been):
        assert (after == RUNNING) <= (before == QUEUED)
    with store.read() as db:
        row = db.scalars(select(Job).where(Job.id == id)).one()
    assert (row.finished_at is not None) == bool(finished)


def test_keys_take_turns_and_a_key_keeps_its_order(store: Store) -> None:
    many = [add(store, "key_a") for _ in range(4)]
    few = [add(store, "key_b") for _ in range(2)]
    started = []
    for _ in range(6):
        with store.write() as db:
            claimed = claim(db)
        assert claimed is not None
        started.append(claimed[0])
    assert [id for id in started if id in many] == many
    assert [id for id in started if id in few] == few
    assert started[:4] in ([many[0], few[0], many[1], few[1]], [many[0], few[0], few[1], many[1]])
    with store.write() as db:
        assert claim(db) is None


def test_a_job_is_claimed_once_and_waits_for_its_former_worker(store: Store) -> None:
    id = add(store)
    with store.write() as db:
        assert claim(db, exclude={id}) is None
        assert claim(db) == (id, 1)
        assert claim(db) is None
        assert not move(db, id, "succeeded", attempt=2)
        assert move(db, id, QUEUED, attempt=1)
        assert claim(db) == (id, 2)
        assert not move(db, id, "succeeded", attempt=1)


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    id = add(store)
    with pytest.raises(ZeroDivisionError), store.write() as db:
        move(db, id, RUNNING)
        _ = 1 / 0
    assert status(store, id) == QUEUED
    with store.read() as db:
        assert db.scalar(select(func.count()).select_from(Job)) == 1


@given(examples=st.integers(10, 10**6))
def test_automatic_values_are_in_range(examples: int) -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    found = resolve_hyperparameters(auto, examples)
    assert 1 <= found["n_epochs"] <= 50
    assert 1 <= found["batch_size"] <= 256
    assert found["n_epochs"] == 1 or examples * found["n_epochs"] <= 25_000
    assert resolve_hyperparameters({"n_epochs": 7}, examples) == {"n_epochs": 7}
