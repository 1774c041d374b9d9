"""A recording is whole whatever happens: no answer is paid for twice, no key is written anywhere."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosted.host import CUT, CUT_AFTER, KEY, Host, busy, hosting, refusal
from tunefork.cli import main
from tunefork.errors import HostedError, RecipeError, RunError
from tunefork.hosted.answers import AnswerStore
from tunefork.migrate import read_recording, record


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("TUNEFORK_API_KEY", KEY)
    with hosting() as host:
        yield host


def questions(folder: Path, count: int = 20) -> Path:
    """A validation file as a service keeps it."""
    file = folder / "valid.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"word {i}"}, {"role": "assistant", "content": f"WORD {i}"}]}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recorded(host: Host, folder: Path, count: int = 20, **options: Any) -> Any:
    asked = questions(folder, count)
    return record(f"{host.url}#ft:m:org::1", folder / "out", asked, confirm=lambda estimate: True, **options)


def no_key_in(folder: Path) -> bool:
    return all(KEY.encode() not in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_answers_logprobs_and_references_are_kept(host: Host, tmp_path: Path) -> None:
    found = recorded(host, tmp_path)
    assert [row.answer for row in found.rows] == [f"WORD {i}" for i in range(20)]
    assert [row.reference for row in found.rows] == [f"WORD {i}" for i in range(20)]
    assert found.rows[3].tokens == [
        {"token": "WORD", "logprob": -0.1},
        {"token": "3", "logprob": -0.1},
    ]
    assert found.about["answers"] == 20
    assert found.about["tokens"] == {"prompt": 400, "completion": 200}
    assert [vars_of(row) for row in read_recording(tmp_path / "out").rows] == [vars_of(row) for row in found.rows]
    assert set(host.asked.values()) == {1}
    assert no_key_in(tmp_path)


def vars_of(row: Any) -> Any:
    return json.loads(json.dumps({name: getattr(row, name) for name in row.__slots__}))


def test_asked_again_nothing_is_sent(host: Host, tmp_path: Path) -> None:
    first = recorded(host, tmp_path)
    again = record(f"{host.url}#ft:m:org::1", tmp_path / "out", questions(tmp_path))  # nothing to confirm
    assert [row.answer for row in again.rows] == [row.answer for row in first.rows]
    assert sum(host.asked.values()) == 20
    recorded(host, tmp_path, count=25)
    assert sum(host.asked.values()) == 25


def test_equal_prompts_are_asked_once(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("question\nsame\nsame\nother\n")
    found = record(f"{host.url}#m", tmp_path / "out", file, text_field="question", confirm=lambda e: e.requests == 2)
    assert [row.answer for row in found.rows] == ["SAME", "SAME", "OTHER"]
    assert host.asked == {"same": 1, "other": 1}


def test_a_storm_is_waited_out(host: Host, tmp_path: Path) -> None:
    host.fault = lambda method, path, times: busy((429, 500, 503)[times - 1]) if times <= 3 else None
    found = recorded(host, tmp_path)
    assert found.about["answers"] == 20
    assert set(host.asked.values()) == {1}
    assert found.about["sent"] == 80
    assert found.about["unanswered"] == 0


def test_cut_connections_are_told_and_sent_again(host: Host, tmp_path: Path) -> None:
    host.fault = lambda method, path, times: (CUT, CUT_AFTER)[times - 1] if times <= 2 else None
    found = recorded(host, tmp_path, count=6)
    assert found.about["answers"] == 6
    assert found.about["unanswered"] == 12
    assert set(host.asked.values()) == {2}  # heard, lost on the way back, asked again: the one case that costs twice


def test_retry_after_is_honoured(host: Host, tmp_path: Path) -> None:
    host.fault = lambda method, path, times: refusal(429, "x", retry_after="1") if times == 1 else None
    started = time.monotonic()
    recorded(host, tmp_path, count=1)
    assert time.monotonic() - started >= 1


def test_a_revoked_key_stops_at_once_and_what_was_answered_stays(host: Host, tmp_path: Path) -> None:
    def revoke(body: dict[str, Any]) -> str:
        if sum(host.asked.values()) >= 8:
            host.keys.clear()
        return str(body["messages"][-1]["content"].upper())

    host.answer = revoke
    with pytest.raises(HostedError) as caught:
        recorded(host, tmp_path, concurrency=2)
    assert caught.value.status == 401
    assert KEY not in str(caught.value)
    with AnswerStore(tmp_path / "out") as store:
        kept = len(list(store.usage()))
    assert 8 <= kept <= 9
    assert sum(host.requests.values()) <= kept + 3  # nobody goes on knocking
    host.keys, before = {KEY}, sum(host.asked.values())
    host.answer = lambda body: body["messages"][-1]["content"].upper()
    assert recorded(host, tmp_path).about["answers"] == 20
    assert sum(host.asked.values()) == before + 20 - kept
    assert no_key_in(tmp_path)


def test_an_account_without_credit_is_no_storm(host: Host, tmp_path: Path) -> None:
    host.fault = lambda method, path, times: refusal(429, "insufficient_quota", "You exceeded your quota")
    with pytest.raises(HostedError, match="credit"):
        recorded(host, tmp_path)
    assert sum(host.requests.values()) == 1


def test_one_refused_prompt_does_not_stop_the_others(host: Host, tmp_path: Path) -> None:
    refused: list[str] = []

    def fault(method: str, path: str, times: int) -> Any:
        if len(host.asked) == 3 and not refused:
            refused.append(path)
            return refusal(400, "content_filter", "The prompt was filtered")
        return None

    host.fault = fault
    found = recorded(host, tmp_path, concurrency=1)
    assert (found.about["answers"], found.about["refused"]) == (19, 1)
    (row,) = [row for row in found.rows if row.error]
    assert (row.answer, "filtered" in row.error) == (None, True)


def test_a_model_that_has_no_logprobs_stops_after_a_few(host: Host, tmp_path: Path) -> None:
    host.fault = lambda *args: refusal(400, "unsupported", "logprobs are not supported with this model")
    with pytest.raises(HostedError, match="logprobs are not supported"):
        recorded(host, tmp_path)
    assert sum(host.requests.values()) <= 16


def test_the_limit_is_never_passed(host: Host, tmp_path: Path) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text('date: "2026-11-26"\nsource: a test\nmodels:\n  127.0.0.1: {m: {input: 10, output: 100}}\n')
    options = {"prices": table, "max_tokens": 10, "concurrency": 4}
    with pytest.raises(HostedError, match="Spending must stay below"):
        recorded(host, tmp_path, limit=0.011, **options)
    with AnswerStore(tmp_path / "out") as store:
        spent = sum(20 * 10 / 1e6 + 10 * 100 / 1e6 for _ in store.usage())
    assert 0.004 < spent <= 0.011
    found = recorded(host, tmp_path, limit=1, **options)
    assert found.about["cost"] == pytest.approx(20 * 0.0012)
    assert sum(host.asked.values()) == 20


def test_what_has_no_bound_is_not_sent_under_a_limit(host: Host, tmp_path: Path) -> None:
    table = tmp_path / "prices.yaml"
    table.write_text('date: "2026-11-26"\nsource: a test\nmodels:\n  127.0.0.1: {m: {input: 10, output: 100}}\n')
    image = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
    rows = [[{"type": "text", "text": "one"}], [{"type": "text", "text": "two"}, image]]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": row}]}) + "\n" for row in rows))
    with pytest.raises(HostedError, match="bound on every request"):
        record(f"{host.url}#m", tmp_path / "out", file, prices=table, limit=5)
    assert not host.requests


def test_a_request_may_be_changed_and_a_system_message_put_before(host: Host, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []
    host.answer = lambda body: bodies.append(body) or "yes"  # type: ignore[func-returns-value]
    words = ["migrate", "record", "--model", f"{host.url}#m", "--prompts", str(questions(tmp_path, 1)), "--yes"]
    words += ["--out", str(tmp_path / "out"), "--set", "hosted.system=Be brief.", "--json"]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--set", "hosted.request={temperature: null, seed: 7}"])
    assert caught.value.code == 0
    (body,) = bodies
    assert (body["seed"], "temperature" in body, body["max_tokens"]) == (7, False, 1024)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert read_recording(tmp_path / "out").rows[0].messages == body["messages"]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--set", "train.epochs=3"])
    assert caught.value.code == 2


def test_requests_run_side_by_side(host: Host, tmp_path: Path) -> None:
    host.delay = 0.05
    recorded(host, tmp_path, concurrency=4)
    assert host.most_at_once == 4


def test_it_must_be_confirmed(host: Host, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--yes"):
        record(f"{host.url}#m", tmp_path / "out", questions(tmp_path))
    assert not host.asked


def test_a_folder_holds_one_model(host: Host, tmp_path: Path) -> None:
    recorded(host, tmp_path, count=1)
    with pytest.raises(RunError, match="one model"):
        record(f"{host.url}#other", tmp_path / "out", questions(tmp_path), confirm=lambda e: True)


def test_killed_again_and_again_it_pays_once(host: Host, tmp_path: Path) -> None:
    """kill -9 at many instants: an answer that is on the disk is never asked for again, and the end is whole."""
    host.delay = 0.02
    file, out, concurrency = questions(tmp_path, 120), tmp_path / "out", 3
    command = [
        sys.executable,
        "-m",
        "tunefork",
        "migrate",
        "record",
        "--model",
        f"{host.url}#m",
        "--prompts",
        str(file),
    ]
    command += ["--out", str(out), "--concurrency", str(concurrency), "--yes"]
    kills = 0
    while True:
        before = _kept(out)
        counted = host.asked.copy()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills < 4:
            _wait_for(functools.partial(_heard, host, sum(counted.values()) + 9, process))
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not [q for q in before if host.asked[q] != counted[q]], "an answer on the disk was asked for again"
        if process.returncode == 0:
            break
        kills += 1
        time.sleep(0.2)  # what the killed process had sent is answered, to nobody
    assert kills == 4
    assert len(read_recording(out).rows) == 120
    assert sum(host.asked.values()) <= 120 + kills * concurrency  # only what was under way at a kill
    assert len(_kept(out)) == 120
    assert no_key_in(tmp_path)


def test_ctrl_c_keeps_what_is_under_way(host: Host, tmp_path: Path) -> None:
    host.delay = 0.05
    file, out = questions(tmp_path, 60), tmp_path / "out"
    command = [sys.executable, "-m", "tunefork", "migrate", "record", "--model", f"{host.url}#m"]
    command += ["--prompts", str(file), "--out", str(out), "--concurrency", "4", "--yes"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_for(functools.partial(_heard, host, 10, process))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert (process.returncode, "the same command goes on" in err) == (130, True), err
    assert len(_kept(out)) == sum(host.asked.values()) < 60
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert sum(host.asked.values()) == 60


def _heard(host: Host, count: int, process: subprocess.Popen[Any]) -> bool:
    return sum(host.asked.values()) >= count or process.poll() is not None


def _kept(out: Path) -> list[str]:
    if not (out / "answers.jsonl").exists():
        return []
    lines = (out / "answers.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line)["request"]["messages"][-1]["content"] for line in lines]


def _wait_for(happened: Any, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)
