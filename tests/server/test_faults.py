"""Cut connections, odd text, many at once, full disks, and damaged databases: nothing acknowledged is lost."""

from __future__ import annotations

import errno
import json
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from sqlalchemy import update

from tests.server.scenes import client_of, rows, serving, settings_in, wait_for
from tunefork.errors import RunError
from tunefork.files import FolderLock
from tunefork.server import Settings, Store, serve
from tunefork.server.jobs.states import claim, move
from tunefork.server.store import Job


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    with serving(settings) as url:
        yield url


def blobs(settings: Settings) -> list[str]:
    return sorted(p.name for p in settings.blobs_path.iterdir()) if settings.blobs_path.is_dir() else []


def test_an_upload_that_is_cut_leaves_nothing(url: str, settings: Settings) -> None:
    before, place = blobs(settings), urlsplit(url)
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    form += b'--b\r\nContent-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n' + rows(1000)
    head = f"POST /v1/files HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {len(form) + 8}\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    for cut in (10, len(form) // 2, len(form)):
        with socket.create_connection((place.hostname or "", place.port or 0)) as connection:
            connection.sendall(head.encode() + form[:cut])
    wait_for(lambda: httpx.get(f"{url}/files").status_code == 200)
    assert blobs(settings) == before
    assert client_of(url).files.list().data == []


def test_many_uploads_at_once_are_all_kept(url: str) -> None:
    client = client_of(url)

    def put(number: int) -> str:
        return client.files.create(file=(f"{number}", b"%d" % number), purpose="user_data").id

    with ThreadPoolExecutor(200) as pool:
        ids = list(pool.map(put, range(200)))
    listed = {file.id for file in client.files.list(purpose="user_data", limit=7)}
    assert set(ids) == listed
    assert all(client.files.content(id).read() == b"%d" % n for n, id in enumerate(ids))


def test_slow_clients_keep_nobody_waiting(url: str) -> None:
    """They send half a header, or half a file, or do not read their answer; meanwhile others are served."""
    place, client = urlsplit(url), client_of(url)
    address = (place.hostname or "", place.port or 0)
    asked = {"model": "fork-tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 8}
    body = json.dumps(asked).encode()
    json_head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    form_head = f"POST /v1/files HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 100000\r\n"
    form_head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    whole = f"{json_head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(120)]
        for number, connection in enumerate(slow):
            connection.sendall((json_head.encode(), form_head.encode(), whole)[number % 3])
        for _ in range(3):
            for connection in slow[1::3]:
                connection.sendall(b"x")  # and one byte more
            started = time.monotonic()
            assert client.files.create(file=b"x", purpose="vision").bytes == 1
            assert client.models.retrieve("fork-tiny").id == "fork-tiny"
            assert time.monotonic() - started < 5
        for connection in slow[2::3]:  # who reads late reads all of it
            reply = b""
            while b"data: [DONE]" not in reply:
                piece = connection.recv(1000)
                assert piece, reply
                reply += piece


def test_a_clock_that_jumps_changes_no_order_and_no_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day, shift, real = 86_400, [0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    settings = settings_in(tmp_path / "data")
    with serving(settings) as url:
        client, made = client_of(url), []
        for shift[0] in (0, day, -day, 0):
            made.append(client.files.create(file=("t.jsonl", rows()), purpose="fine-tune").id)
        assert [file.id for file in client.files.list(limit=2)] == made[::-1]
        upload = client.uploads.create(filename="a", bytes=1, mime_type="text/plain", purpose="batch")
        shift[0] = -day
        part = client.uploads.parts.create(upload.id, data=b"x")
        assert client.uploads.complete(upload.id, part_ids=[part.id]).status == "completed"
        jobs = [client.fine_tuning.jobs.create(model="fork-tiny", training_file=id).id for id in made]
        wait_for(lambda: {j.status for j in client.fine_tuning.jobs.list()} == {"queued"})
        assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == jobs[::-1]
    store, started = Store(settings), []
    with store.write() as db:
        for job, key in zip(jobs, ("ann", "ann", "bob", "bob"), strict=True):
            db.execute(update(Job).where(Job.id == job).values(key_id=key))
    for shift[0] in (day, 0, 2, 4):  # ann's first start is, so it seems, tomorrow's
        with store.write() as db:
            claimed = claim(db)
            assert claimed is not None
            move(db, claimed[0], "cancelled")
        started.append(jobs.index(claimed[0]))
    store.close()
    assert started == [0, 2, 1, 3]


def test_parts_at_once_and_two_completions(url: str) -> None:
    client = client_of(url)
    upload = client.uploads.create(filename="a", bytes=30, mime_type="text/plain", purpose="batch")
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda n: client.uploads.parts.create(upload.id, data=bytes([n])).id, range(30)))

        def complete(_: int) -> str | None:
            try:
                done = client.uploads.complete(upload.id, part_ids=parts)
            except openai.BadRequestError:
                return None
            assert done.file is not None
            return done.file.id

        files = [id for id in pool.map(complete, range(4)) if id]
    assert len(files) == 1
    assert client.files.content(files[0]).read() == bytes(range(30))


ODD = [
    "\x00",
    "\ud800",
    "\u202e",
    "é" * 50,
    "'; DROP TABLE jobs; --",
    '"',
    "\\",
    "%00",
    "../..",
    "\r\nSet-Cookie: a=b",
    "$.a",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_text_is_never_an_error_of_the_server(url: str, text: str) -> None:
    quoted = "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))
    body = b'{"model":"fork-tiny","training_file":%s,"suffix":%s,"metadata":{%s:%s},%s:1}'
    written = json.dumps(text).encode()
    calls = [
        ("GET", f"/files/{quoted}", None),
        ("GET", f"/files?after={quoted}&purpose={quoted}", None),
        ("GET", f"/models/{quoted}", None),
        ("GET", f"/fine_tuning/jobs?metadata[{quoted}]={quoted}", None),
        ("GET", f"/fine_tuning/jobs/{quoted}/events", None),
        ("POST", "/fine_tuning/jobs", body.replace(b",%s:1", b"") % ((written,) * 4)),
        ("POST", "/fine_tuning/jobs", body % ((written,) * 5)),
        ("POST", f"/uploads/{quoted}/complete", b'{"part_ids":[%s]}' % written),
        ("POST", "/uploads", b'{"filename":%s,"purpose":"batch","bytes":1,"mime_type":%s}' % (written, written)),
    ]
    for method, path, content in calls:
        reply = httpx.request(method, url + path, content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code < 500, (method, path, reply.text)
        assert "set-cookie" not in reply.headers


def test_a_full_disk_is_said_and_nothing_is_kept(url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = blobs(settings)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("tunefork.files._write_all", full)
        with pytest.raises(openai.APIStatusError) as refused:
            client_of(url).files.create(file=b"x", purpose="user_data")
        assert (refused.value.status_code, refused.value.code) == (507, "insufficient_storage")
    assert blobs(settings) == before
    assert client_of(url).files.create(file=b"x", purpose="user_data").bytes == 1


@pytest.mark.parametrize("damage", ["all of it", "a page", "another file"])
def test_a_damaged_database_is_refused(tmp_path: Path, damage: str) -> None:
    settings = settings_in(tmp_path / "data")
    Store(settings).close()
    data = bytearray(settings.database_path.read_bytes())
    if damage == "another file":
        data = bytearray(b"hello" * 1000)
    else:
        data[0 if damage == "all of it" else 4096 :] = b"\xff" * (len(data) - (0 if damage == "all of it" else 4096))
    settings.database_path.write_bytes(data)
    before = tempfile.gettempdir()
    with pytest.raises(RunError, match="must be whole"):
        serve(data=settings.data)
    assert tempfile.gettempdir() == before  # the caller's process is as it was


def test_one_server_a_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(RunError, match="one process may write"):
        serve(data=tmp_path)
    lock.release()
