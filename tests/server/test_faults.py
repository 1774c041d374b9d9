"""Cut connections, odd text, many at once, full disks, and damaged databases: nothing acknowledged is lost."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.server.scenes import client_of, rows, serving, settings_in, wait_for
from tunefork.errors import RunError
from tunefork.files import FolderLock
from tunefork.server import Settings, Store, serve


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

    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(put, range(60)))
    listed = {file.id for file in client.files.list(purpose="user_data", limit=7)}
    assert set(ids) == listed
    assert all(client.files.content(id).read() == b"%d" % n for n, id in enumerate(ids))


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
    with pytest.raises(RunError, match="must be whole"):
        serve(data=settings.data)


def test_one_server_a_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(RunError, match="one process may write"):
        serve(data=tmp_path)
    lock.release()
