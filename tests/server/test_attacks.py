"""What somebody may try, with a key or without: the things of others, paths, bodies, forms, headers. All is refused."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.scenes import client_of, rows, serving, settings_in, wait_for
from tests.server.seeded import JOB, MODELS, UPLOAD, seeded_rows
from tunefork.server import Settings, Store, create_key
from tunefork.server.blobs import write_blob
from tunefork.server.store import File

SECRET = "nobody-else-may-read-this"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("data")
    (folder / "secret").write_text(SECRET)
    return settings_in(folder / "inner", json_bytes=2**20, file_bytes=2**20)


@pytest.fixture(scope="module")
def keys(settings: Settings) -> dict[str, str]:
    """`owner` has everything that `seeded_rows` makes; `thief` is of another project."""
    store = Store(settings)
    with store.write() as db:
        for row in seeded_rows():
            db.add(row)
            db.flush()
    for row in seeded_rows():
        if isinstance(row, File):
            write_blob(settings.blobs_path / row.id, [SECRET.encode()], row)
    made = {name: create_key(store, project=p)[0] for name, p in {"owner": "proj_default", "thief": "proj_t"}.items()}
    store.close()
    return made


@pytest.fixture(scope="module")
def url(settings: Settings, keys: dict[str, str]) -> Iterator[str]:
    with serving(settings) as url:
        yield url


def sent(url: str, keys: dict[str, str], method: str, path: str, who: str = "thief", **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {keys[who]}", **more.pop("headers", {})}
    return httpx.request(method, url + path, headers=headers, timeout=30, **more)


def refused(reply: httpx.Response, *statuses: int) -> None:
    assert reply.status_code in (statuses or (400, 403, 404, 405, 413)), reply.text[:300]
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert SECRET not in reply.text
    assert "Traceback" not in reply.text


JOBS, CHECKPOINTS = "/fine_tuning/jobs", "/fine_tuning/checkpoints"
CHAT = {"messages": [{"role": "user", "content": "x"}]}
OTHERS: list[tuple[str, str, Any]] = [
    ("GET", "/files/file-abc123", None),
    ("GET", "/files/file-abc123/content", None),
    ("DELETE", "/files/file-abc123", None),
    ("POST", f"/uploads/{UPLOAD}/complete", {"part_ids": ["string"]}),
    ("POST", f"/uploads/{UPLOAD}/cancel", {}),
    ("GET", f"{JOBS}/{JOB}", None),
    ("GET", f"{JOBS}/{JOB}/events", None),
    ("GET", f"{JOBS}/{JOB}/checkpoints", None),
    ("POST", f"{JOBS}/{JOB}/cancel", {}),
    ("POST", f"{JOBS}/{JOB}/pause", {}),
    ("POST", f"{JOBS}/{JOB}/resume", {}),
    ("POST", JOBS, {"model": "fork-tiny", "training_file": "file-abc123"}),
    ("GET", f"/models/{MODELS[0]}", None),
    ("DELETE", f"/models/{MODELS[0]}", None),
    ("GET", f"{CHECKPOINTS}/{MODELS[0]}/permissions", None),
    ("POST", f"{CHECKPOINTS}/{MODELS[0]}/permissions", {"project_ids": ["proj_t"]}),
    ("DELETE", f"{CHECKPOINTS}/{MODELS[1]}/permissions/cp_zc4Q7MP6XxulcVzj4MZdwsAB", None),
    ("POST", "/chat/completions", {"model": MODELS[0], **CHAT}),
    ("POST", "/completions", {"model": MODELS[0], "prompt": "x"}),
]


@pytest.mark.parametrize(("method", "path", "body"), OTHERS, ids=[f"{m} {p}" for m, p, _ in OTHERS])
def test_what_is_anothers_is_not_there(url: str, keys: dict[str, str], method: str, path: str, body: Any) -> None:
    refused(sent(url, keys, method, path, json=body), 400, 404)
    assert sent(url, keys, "GET", "/files/file-abc123/content", "owner").text == SECRET


def test_nothing_of_another_is_listed(url: str, keys: dict[str, str]) -> None:
    for path in ("/files", JOBS, f"{JOBS}?after={JOB}", "/files?after=file-abc123&order=asc"):
        assert sent(url, keys, "GET", path).json()["data"] == []
    assert {m["id"] for m in sent(url, keys, "GET", "/models").json()["data"]} == {"fork-tiny"}


PATHS = [
    *("/files/..%2f..%2fsecret/content", "/files/%2e%2e/%2e%2e/secret", "/files/..%5c..%5csecret/content"),
    *("/files//etc/passwd/content", "/files/file-abc123%00/content", f"{JOBS}/..%2f{JOB}", "/models/..%2f..%2fsecret"),
    *("/models/ft:fork-tiny:tunefork::..%2f..%2fsecret", "/models/%2fetc%2fpasswd", "/files/%ff%fe/content"),
    *("/files/%252e%252e%252fsecret/content", "/../../secret", "/files/file-abc123/content/../../../secret"),
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_out(url: str, keys: dict[str, str], path: str) -> None:
    """Written to the socket as it is: a client would tidy it up."""
    place = urlsplit(url)
    head = f"GET /v1{path} HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {keys['thief']}\r\n"
    with socket.create_connection((place.hostname or "", place.port or 0)) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    assert reply.split(b" ", 2)[1] in (b"400", b"404")
    assert SECRET.encode() not in reply


BODIES: dict[str, Any] = {
    "nested": b"[" * 100_000,
    "nested object": b'{"a":' * 100_000,
    "not UTF-8": b'{"model": "\xff"}',
    "an array": b"[]",
    "nothing": b"",
    "half a surrogate": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a surrogate in a message": b'{"model": "fork-tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a surrogate in a tool": b'{"model": "fork-tiny", "messages": [{"role": "user", "content": "x"}], '
    b'"tools": [{"type": "function", "function": {"name": "f", "description": "\\udc00"}}]}',
    "a deep message": b'{"model": "fork-tiny", "messages": [{"role": "user", "content": '
    + b"[" * 900
    + b"]" * 900
    + b"}]}",
    "NaN": b'{"model": "fork-tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "infinity": b'{"model": "fork-tiny", "messages": [{"role": "user", "content": "x"}], "top_p": 1e999}',
    "a long number": b'{"model": "fork-tiny", "seed": ' + b"9" * 4000 + b"}",
    "a role that is an object": b'{"model": "fork-tiny", "messages": [{"role": {"a": 1}, "content": "x"}]}',
    "a template in a tool": b'{"model": "fork-tiny", "messages": [{"role": "tool", "content": {"x": "{{ 7 * 7 }}"}}]}',
    "a compressed bomb": gzip.compress(b'{"model": "' + b"x" * 10**7 + b'"}'),
    "longer than allowed": b'{"model": "' + b"x" * 2**20 + b'"}',
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/chat/completions", JOBS])
def test_no_body_is_an_error_of_the_server(url: str, keys: dict[str, str], name: str, path: str) -> None:
    encoding = {"Content-Encoding": "gzip"} if "compressed" in name else {}
    headers = {"Content-Type": "application/json", **encoding}
    refused(sent(url, keys, "POST", path, content=BODIES[name], headers=headers))


def test_a_body_without_a_length_is_counted_as_it_comes(url: str, keys: dict[str, str]) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 2**16

    refused(sent(url, keys, "POST", JOBS, content=endless()), 413)


def test_a_compressed_file_is_not_opened(url: str, keys: dict[str, str]) -> None:
    bomb = gzip.compress(b"0" * 10**8)
    client = client_of(url, keys["thief"])
    file = client.files.create(file=("rows.jsonl.gz", bomb), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="fork-tiny", training_file=file.id)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "failed")
    assert "not UTF-8" in str(client.fine_tuning.jobs.retrieve(job.id).error)


FORMS: dict[str, dict[str, Any]] = {
    "two files": {"files": [("file", ("a", b"x")), ("file", ("b", b"x"))], "data": {"purpose": "batch"}},
    "many fields": {"files": {"file": ("a", b"x")}, "data": {f"f{n}": "x" for n in range(1000)}},
    "a long field": {"files": {"file": ("a", b"x")}, "data": {"purpose": "x" * 10**5}},
    "a made up purpose": {"files": {"file": ("a", b"x")}, "data": {"purpose": "fine-tune-results"}},
    "an owner": {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch", "project_id": "proj_default"}},
    "no boundary": {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}},
    "a wrong type": {"content": b"{}", "headers": {"Content-Type": "application/json"}},
    "too long a file": {"files": {"file": ("a", b"x" * (2**20 + 1))}, "data": {"purpose": "batch"}},
}


@pytest.mark.parametrize("name", FORMS)
def test_no_form_is_an_error_of_the_server(url: str, keys: dict[str, str], name: str, settings: Settings) -> None:
    before = sorted(p.name for p in settings.blobs_path.iterdir())
    refused(sent(url, keys, "POST", "/files", **FORMS[name]))
    assert sorted(p.name for p in settings.blobs_path.iterdir()) == before


@pytest.mark.parametrize(
    "header",
    [
        {"OpenAI-Project": "proj_default"},
        {"X-Forwarded-For": "127.0.0.1", "Authorization": ""},
        {"X-Forwarded-User": "proj_default", "Authorization": "Bearer"},
        {"X-Http-Method-Override": "DELETE", "Authorization": "Bearer sk-tf-"},
        {"Authorization": "Bearer " + "x" * 5000},
        {"Host": "localhost", "Authorization": "Bearer null"},
    ],
    ids=str,
)
def test_no_header_stands_for_a_key(url: str, keys: dict[str, str], header: dict[str, str]) -> None:
    reply = sent(url, keys, "GET", "/files/file-abc123/content", headers=header)
    refused(reply, 400, 401)
    assert rows() not in reply.content


def test_what_was_tried_is_not_in_the_log(url: str, keys: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    def logged() -> str:  # by the server: the client logs as well
        return "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("tunefork"))

    with caplog.at_level("INFO"):
        sent(url, keys, "GET", f"/files?api_key={keys['thief']}&after=private")
        sent(url, keys, "POST", "/chat/completions", json={"model": "private", **CHAT})
        wait_for(lambda: "/v1/chat/completions" in logged())  # a request's line is written after its reply is away
    ours = logged()
    assert "/v1/files" in ours
    assert "private" not in ours
    assert keys["thief"] not in ours
