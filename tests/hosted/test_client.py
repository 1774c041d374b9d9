"""The client's manners: what it waits for, what it never shows, and lists without an end."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from tests.hosted.host import CUT, KEY, Host, hosting, refusal
from tunefork.errors import HostedError
from tunefork.hosted import find_model, jobs
from tunefork.hosted.client import Client, _retry_after


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("TUNEFORK_API_KEY", KEY)
    with hosting() as host:
        yield host


def client(host: Host, **options: Any) -> Client:
    return Client(find_model(f"{host.url}#m").service, **options)


BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_what_retry_after_says() -> None:
    soon = datetime.now(UTC) + timedelta(seconds=30)
    assert _retry_after({"retry-after": "7"}) == 7
    assert _retry_after({"retry-after": "1.5"}) == 1.5
    assert _retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert 28 < (_retry_after({"retry-after": format_datetime(soon, usegmt=True)}) or 0) <= 30
    assert _retry_after({"retry-after": format_datetime(soon - timedelta(hours=1), usegmt=True)}) == 0
    assert _retry_after({"retry-after": "soon"}) is None
    assert _retry_after({}) is None


def test_patience_has_an_end_and_a_wait_beyond_it_is_not_begun(host: Host) -> None:
    host.fault = lambda *args: refusal(503, "x", retry_after="3600")
    waits: list[str] = []
    with pytest.raises(HostedError, match="within 5 seconds"):
        client(host, patience=5, on_wait=waits.append).chat(BODY)
    assert (sum(host.requests.values()), waits) == (1, [])
    host.fault = lambda *args: CUT
    with pytest.raises(HostedError, match="nothing usable"):
        client(host, patience=1).chat(BODY)


def test_a_page_of_a_proxy_is_no_answer(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.fault = lambda method, path, times: (200, {}, {"maintenance": True}) if times == 1 else None
    assert client(host).chat(BODY)["choices"]
    assert "127.0.0.1: no answer (ValueError); again in" in caplog.text  # nobody waits without being told why


def test_the_key_is_in_no_error_and_no_trace(host: Host) -> None:
    host.keys.clear()
    try:
        client(host).chat(BODY)
    except HostedError as error:
        shown = "".join(traceback.format_exception(error)) + repr(error)
    assert error_status(shown) and KEY not in shown


def error_status(shown: str) -> bool:
    return "401" in shown and "Bearer …" in shown  # the host had repeated the key in its message


def test_a_list_that_never_ends_is_left(host: Host) -> None:
    page = {"object": "list", "data": [{"id": "ftjob-1", "status": "running"}], "has_more": True}
    host.fault = lambda method, path, times: (200, {}, page)
    assert [job["id"] for job in jobs.list_jobs(client(host))] == ["ftjob-1"]


def test_result_files_come_as_base64_or_plain(host: Host) -> None:
    table = "step,train_loss,valid_loss\n1,0.5,\n2,0.25,0.3\n"
    assert jobs.metrics_by_step(table.encode()) == [
        {"step": 1, "train_loss": 0.5},
        {"step": 2, "train_loss": 0.25, "valid_loss": 0.3},
    ]


def test_without_the_extra_a_sentence_says_what_to_install() -> None:
    code = "import sys; sys.modules['openai'] = None; from tunefork.cli import main; main(sys.argv[1:])"
    words = ["migrate", "record", "--model", "http://127.0.0.1:1/v1#m", "--out", "/nowhere"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'tunefork[hosted]'" in done.stderr
    assert json.dumps(done.stdout) == '""'
