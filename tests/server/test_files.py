"""Files through the official client: what is kept, listed, given back and deleted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from sqlalchemy import update

from tests.server.scenes import client_of, rows, serving, settings_in, wait_for
from tunefork.server import Store
from tunefork.server.store import File, Upload


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serving(settings_in(tmp_path_factory.mktemp("data"))) as url:
        yield client_of(url)


def test_a_file_comes_back_as_it_was(client: openai.OpenAI) -> None:
    made = client.files.create(file=("train.jsonl", rows()), purpose="fine-tune")
    assert (made.filename, made.bytes, made.purpose, made.status) == (
        "train.jsonl",
        len(rows()),
        "fine-tune",
        "processed",
    )
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == rows()
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.retrieve(made.id)
    assert refused.value.body == {
        "message": f"No such File object: {made.id}",
        "type": "invalid_request_error",
        "param": "id",
        "code": None,
    }


def test_lists_go_page_by_page_in_both_orders(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=("a", bytes([i])), purpose="evals").id for i in range(5)]
    assert [f.id for f in client.files.list(purpose="evals", limit=2)] == ids[::-1]
    assert [f.id for f in client.files.list(purpose="evals", limit=2, order="asc")] == ids
    page = client.files.list(purpose="evals", limit=2)
    assert page.has_more
    assert [f.id for f in page.data] == ids[:-3:-1]
    assert client.files.list(purpose="evals", after=ids[0]).data == []
    assert client.files.list(purpose="batch").data == []


def test_a_file_can_expire(client: openai.OpenAI) -> None:
    made = client.files.create(file=b"x", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=b"x", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 10})
    assert refused.value.param == "expires_after.seconds"


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\x", "a/b/c", "\x00", "", "line\nbreak"])
def test_names_are_never_paths(client: openai.OpenAI, name: str) -> None:
    made = client.files.create(file=(name or "x", b"x"), purpose="user_data")
    assert not {"/", "\\", "\n", "\x00"} & set(made.filename)
    assert client.files.content(made.id).read() == b"x"


def test_an_upload_is_put_together_in_the_order_asked_for(client: openai.OpenAI) -> None:
    upload = client.uploads.create(filename="big.jsonl", bytes=6, mime_type="text/jsonl", purpose="fine-tune")
    parts = {data: client.uploads.parts.create(upload.id, data=data) for data in (b"ef", b"ab", b"cd")}
    ids = [parts[data].id for data in (b"ab", b"cd", b"ef")]
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=ids, md5="0" * 32)
    done = client.uploads.complete(upload.id, part_ids=ids, md5=hashlib.md5(b"abcdef").hexdigest())
    assert done.status == "completed"
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"abcdef"
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.uploads.parts.create(upload.id, data=b"more")


def test_a_part_has_its_data_and_nothing_else(client: openai.OpenAI) -> None:
    upload = client.uploads.create(filename="a", bytes=3, mime_type="text/plain", purpose="batch")
    for form in ({"files": {"data": b"x"}, "data": {"more": "y"}}, {"files": {"other": b"x"}}):
        reply = client._client.post(f"{client.base_url}uploads/{upload.id}/parts", **form)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unknown_parameter")


def test_an_upload_holds_what_was_declared(client: openai.OpenAI) -> None:
    upload = client.uploads.create(filename="a", bytes=3, mime_type="text/plain", purpose="batch")
    part = client.uploads.parts.create(upload.id, data=b"ab")
    with pytest.raises(openai.BadRequestError, match="no more than the 3 bytes"):
        client.uploads.parts.create(upload.id, data=b"cd")
    with pytest.raises(openai.BadRequestError, match="Received 2"):
        client.uploads.complete(upload.id, part_ids=[part.id])
    assert client.uploads.cancel(upload.id).status == "cancelled"


def test_quotas_and_sizes(tmp_path: Path) -> None:
    with serving(settings_in(tmp_path / "data", file_bytes=100, project_bytes=150)) as url:
        client = client_of(url)
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=b"x" * 101, purpose="user_data")
        assert (refused.value.status_code, refused.value.code) == (413, "request_too_large")
        kept = client.files.create(file=b"x" * 100, purpose="user_data")
        with pytest.raises(openai.BadRequestError) as full:
            client.files.create(file=b"x" * 100, purpose="user_data")
        assert full.value.code == "storage_quota_exceeded"
        with pytest.raises(openai.BadRequestError):
            client.uploads.create(filename="a", bytes=51, mime_type="text/plain", purpose="batch")
        client.files.delete(kept.id)
        client.files.create(file=b"x" * 100, purpose="user_data")
        assert len(list((tmp_path / "data" / "files").iterdir())) == 1


def age(folder: Path, rows: type[File] | type[Upload]) -> None:
    """Makes all that the store has of a kind expire."""
    store = Store(settings_in(folder))
    with store.write() as db:
        db.execute(update(rows).values(expires_at=1))
    store.close()


def test_what_has_expired_is_gone(tmp_path: Path) -> None:
    with serving(settings_in(tmp_path / "data")) as url:
        client = client_of(url)
        upload = client.uploads.create(filename="a", bytes=1, mime_type="text/plain", purpose="batch")
        part = client.uploads.parts.create(upload.id, data=b"x")
        age(tmp_path / "data", Upload)
        with pytest.raises(openai.BadRequestError, match="which is expired"):
            client.uploads.complete(upload.id, part_ids=[part.id])
        file = client.files.create(
            file=b"x", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    age(tmp_path / "data", File)
    with serving(settings_in(tmp_path / "data")) as url:
        wait_for(lambda: not any((tmp_path / "data" / "files").iterdir()))
        wait_for(lambda: not any((tmp_path / "data" / "uploads").iterdir()))
        assert client_of(url).files.list().data == []
        with pytest.raises(openai.NotFoundError):
            client_of(url).files.content(file.id)
