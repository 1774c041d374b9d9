"""Keys, scopes and tenants: who is let in, what they may do, and that projects do not see each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.scenes import client_of, rows, serving, settings_in
from tunefork.errors import RecipeError
from tunefork.server import Settings, Store, create_key, revoke_key, serve


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def keys(settings: Settings) -> dict[str, str]:
    store = Store(settings)
    made = {name: create_key(store, project=f"proj_{name}")[0] for name in ("ann", "bob")}
    made["reader"] = create_key(store, project="proj_ann", scopes=["api.files.read"])[0]
    made["former"], row = create_key(store, project="proj_ann")
    revoke_key(store, row.id)
    store.close()
    return made


@pytest.fixture(scope="module")
def url(settings: Settings, keys: dict[str, str]) -> Iterator[str]:
    with serving(settings) as url:
        yield url


@pytest.mark.parametrize("name", ["former", "none", "made up"])
def test_only_a_key_that_holds_lets_in(url: str, keys: dict[str, str], name: str) -> None:
    key = keys.get(name, "sk-tf-unknown")
    headers = {} if name == "none" else {"Authorization": f"Bearer {key}"}
    reply = httpx.get(f"{url}/files", headers=headers)
    assert reply.status_code == 401
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert key not in reply.text
    assert reply.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "sneaky",
    [
        {"params": {"api_key": "KEY"}},
        {"params": {"authorization": "Bearer KEY"}},
        {"headers": {"Authorization": "Basic KEY"}},
        {"headers": {"Authorization": "KEY"}},
        {"headers": {"X-Api-Key": "KEY"}},
        {"headers": {"api-key": "KEY"}},
        {"cookies": {"Authorization": "Bearer KEY"}},
        {"headers": {"Authorization": "Bearer KEY", "OpenAI-Project": "proj_bob"}},
        {"headers": {"Authorization": "Bearer KEY KEY"}},
    ],
)
def test_a_key_counts_in_its_header_alone(url: str, keys: dict[str, str], sneaky: dict) -> None:
    given = {part: {k: v.replace("KEY", keys["ann"]) for k, v in values.items()} for part, values in sneaky.items()}
    with httpx.Client(cookies=given.pop("cookies", None)) as client:
        assert client.get(f"{url}/files", **given).status_code == 401


def test_a_scope_that_is_missing_is_named(url: str, keys: dict[str, str]) -> None:
    reader = client_of(url, keys["reader"])
    assert list(reader.files.list()) == []
    with pytest.raises(openai.PermissionDeniedError, match=r"Missing scopes: api\.files\.write"):
        reader.files.create(file=b"x", purpose="user_data")
    with pytest.raises(openai.PermissionDeniedError, match=r"api\.fine_tuning\.jobs\.read"):
        reader.fine_tuning.jobs.list()


def test_projects_do_not_see_each_other(url: str, keys: dict[str, str]) -> None:
    ann, bob = client_of(url, keys["ann"]), client_of(url, keys["bob"])
    file = ann.files.create(file=("t.jsonl", rows()), purpose="fine-tune")
    upload = ann.uploads.create(filename="a", bytes=1, mime_type="text/plain", purpose="batch")
    job = ann.fine_tuning.jobs.create(model="fork-tiny", training_file=file.id)
    attempts = [
        lambda: bob.files.retrieve(file.id),
        lambda: bob.files.content(file.id),
        lambda: bob.files.delete(file.id),
        lambda: bob.uploads.parts.create(upload.id, data=b"x"),
        lambda: bob.uploads.complete(upload.id, part_ids=[]),
        lambda: bob.uploads.cancel(upload.id),
        lambda: bob.fine_tuning.jobs.retrieve(job.id),
        lambda: bob.fine_tuning.jobs.cancel(job.id),
        lambda: bob.fine_tuning.jobs.pause(job.id),
        lambda: bob.fine_tuning.jobs.resume(job.id),
        lambda: bob.fine_tuning.jobs.list_events(job.id),
        lambda: bob.fine_tuning.jobs.checkpoints.list(job.id),
    ]
    for attempt in attempts:
        with pytest.raises(openai.NotFoundError):
            attempt()
    with pytest.raises(openai.BadRequestError, match="No such File"):
        bob.fine_tuning.jobs.create(model="fork-tiny", training_file=file.id)
    assert bob.files.list().data == []
    assert bob.fine_tuning.jobs.list().data == []
    assert ann.files.list(after=file.id).data == []
    assert ann.fine_tuning.jobs.retrieve(job.id).status in ("validating_files", "queued")


def test_errors_of_every_kind_are_one_object(url: str, keys: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {keys['ann']}"}
    calls = [
        ("GET", "/nothing", {}, 404),
        ("PUT", "/files", {}, 405),
        ("POST", "/responses", {"json": {"model": "fork-tiny", "input": "x"}}, 400),
        ("POST", "/fine_tuning/jobs", {"content": b"{"}, 400),
        ("POST", "/fine_tuning/jobs", {"content": b"[" * 100_000}, 400),
        ("POST", "/fine_tuning/jobs", {"json": []}, 400),
        ("POST", "/fine_tuning/jobs", {"json": {"model": "x"}}, 400),
        ("POST", "/fine_tuning/jobs", {}, 400),
        ("POST", "/files", {"data": {"purpose": "batch"}}, 400),
        ("POST", "/files", {"data": {"purpose": "no"}, "files": {"file": b"x"}}, 400),
        ("POST", "/files", {"content": b"no form"}, 400),
        ("POST", "/files", {"files": {"file": b"x"}, "data": {"purpose": "batch", "x": "y"}}, 400),
        ("GET", "/files?limit=10001", {}, 400),
        ("GET", "/files?limit=x", {}, 400),
        ("GET", "/files/..%2F..%2Fetc%2Fpasswd", {}, 404),
        ("GET", "/models/..%2F..%2Fetc", {}, 404),
        ("DELETE", "/models/fork-tiny", {}, 403),
        ("POST", "/uploads", {"json": {"filename": "a", "purpose": "batch", "bytes": "1", "mime_type": "a"}}, 400),
        ("POST", "/uploads", {"json": {"filename": "a", "purpose": "batch", "bytes": -1, "mime_type": "a"}}, 400),
    ]
    for method, path, more, status in calls:
        reply = httpx.request(method, url + path, headers=headers, **more)
        assert (reply.status_code, set(reply.json())) == (status, {"error"}), (method, path, reply.text)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert reply.headers["x-request-id"].startswith("req_")


def test_a_body_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with serving(settings_in(tmp_path / "data", json_bytes=100)) as url:
        reply = httpx.post(f"{url}/fine_tuning/jobs", json={"model": "x" * 200, "training_file": "y"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
        chunks = (b"x" * 50 for _ in range(100))
        assert httpx.post(f"{url}/fine_tuning/jobs", content=chunks).status_code in (400, 413)


@pytest.mark.parametrize("header", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}])
def test_without_keys_other_sites_are_refused(tmp_path: Path, header: dict[str, str]) -> None:
    with serving(settings_in(tmp_path / "data")) as url:
        assert httpx.get(f"{url}/files").status_code == 200
        assert httpx.get(f"{url}/files", headers=header).status_code == 403


def test_a_server_for_others_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="must have an API key"):
        serve(data=tmp_path / "data", host="0.0.0.0")


def test_health_needs_no_key(url: str) -> None:
    root = url.removesuffix("/v1")
    assert httpx.get(f"{root}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{root}/readyz").json() == {"status": "ok", "queue": True, "disk": True}
