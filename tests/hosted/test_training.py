"""`--method hosted` against our own server: one job whatever happens, everything brought home, measured as at home."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosted.host import CUT, CUT_AFTER, KEY, Host, busy, hosting, refusal
from tests.server.scenes import client_of, server_process, wait_for
from tunefork.errors import DataError, HostedError, RecipeError, RunError
from tunefork.report import write_report
from tunefork.run import RunFolder
from tunefork.workflows import Listener, cancel_hosted, evaluate, finetune, tuned_model

pytestmark = pytest.mark.slow
COLOURS = ("teal", "coral")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server_process(tmp_path_factory.mktemp("served") / "data") as (_, url):
        yield url


@pytest.fixture
def host(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Our own server behind a host that can fail."""
    monkeypatch.setenv("TUNEFORK_API_KEY", KEY)
    monkeypatch.setenv("NEBIUS_API_KEY", KEY)
    with hosting(server.removesuffix("/")) as host:
        yield host


def things(folder: Path, count: int = 30) -> Path:
    file = folder / "things.csv"
    rows = [f"the {'sea' if i % 2 else 'reef'} number {i},{COLOURS[i % 2]}" for i in range(count)]
    file.write_text("text,label\n" + "\n".join(rows) + "\n")
    return file


def recipe(host: Host, folder: Path, **train: Any) -> dict[str, Any]:
    return {
        "model": f"{host.url}#fork-tiny",
        "task": "classification",
        "data": {"train": str(things(folder))},
        "train": {"method": "hosted", "epochs": 2, "batch_size": 8, **train},
        "evaluate": {"bootstrap": 100},
        "hosted": {"cache": str(folder / "cache"), "limit": 0, "suffix": "sea"},
        "out": str(folder / "run"),
    }


def test_trained_there_measured_here(host: Host, tmp_path: Path) -> None:
    result = finetune(recipe(host, tmp_path)).result
    hosted = result["hosted"]
    assert hosted["model"].startswith("ft:fork-tiny:tunefork:sea:")
    assert hosted["hyperparameters"]["n_epochs"] == 2
    assert (result["steps"], len(result["train"]["looks"]) > 0) == (6, True)
    assert result["baselines"].keys() == {"majority", "tfidf", "zero_shot", "in_context"}
    assert result["test"]["accuracy"]["n"] == 6
    with RunFolder.open(tmp_path / "run", write=False) as run:
        log = run.read_log()
    assert [entry["step"] for entry in log if entry["kind"] == "step"] == list(range(1, 7))
    assert log[-1]["text"] == "The job has successfully completed"
    state = json.loads((tmp_path / "run" / "hosted.json").read_text())
    assert len(state["checkpoints"]) == 2
    (table,) = (tmp_path / "run" / "result_files").iterdir()
    assert table.read_text().startswith("step,")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Hosted fine-tuning" in page
    assert state["job"]["id"] in page
    assert write_report(tmp_path / "run").read_text() == page
    assert host.heard["POST /fine_tuning/jobs"] == 1
    again = evaluate(tmp_path / "run", things(tmp_path))
    assert again.metrics["accuracy"]["n"] == 30
    assert tuned_model(tmp_path / "run") == f"{host.url}#{hosted['model']}"
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_a_connection_that_breaks_at_every_step(host: Host, server: str, tmp_path: Path) -> None:
    """Each request is cut once before it is heard, or once after; there is one file of each kind, and one job."""
    seen: dict[str, int] = {}

    def fault(method: str, path: str, times: int) -> Any:
        if path == "/chat/completions":
            return busy() if times == 1 else None
        seen[f"{method} {path}"] = seen.get(f"{method} {path}", 0) + 1
        return {1: CUT_AFTER, 2: CUT, 3: busy(503)}.get(seen[f"{method} {path}"])

    host.fault = fault
    before = len(list(client_of(server).fine_tuning.jobs.list(limit=100)))
    finetune(recipe(host, tmp_path))
    state = json.loads((tmp_path / "run" / "hosted.json").read_text())
    jobs = list(client_of(server).fine_tuning.jobs.list(limit=100))
    assert len(jobs) == before + 1
    names = [file.filename for file in client_of(server).files.list(purpose="fine-tune")]
    assert sorted(name for name in names if state["run"] in name) == [
        f"tunefork-{state['run']}-dev.jsonl",
        f"tunefork-{state['run']}-train.jsonl",
    ]
    assert len(seen) >= 6


def test_killed_while_it_follows_it_goes_on_with_the_same_job(host: Host, server: str, tmp_path: Path) -> None:
    given = recipe(host, tmp_path, epochs=12)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(given))  # JSON is YAML
    command = [sys.executable, "-m", "tunefork", "train", str(file), "--yes"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "run" / "hosted.json"
    wait_for(lambda: state.exists() and json.loads(state.read_text())["job"] is not None)
    process.kill()
    process.communicate()
    with pytest.raises(RunError, match="--resume"):
        finetune(given)  # a second job is never begun by accident
    before = len(list(client_of(server).fine_tuning.jobs.list(limit=100)))
    result = finetune(given, resume=True).result
    assert len(list(client_of(server).fine_tuning.jobs.list(limit=100))) == before
    assert result["steps"] == 36
    with RunFolder.open(tmp_path / "run", write=False) as run:
        ids = [entry["id"] for entry in run.read_log()]
    assert len(ids) == len(set(ids))
    assert finetune(given, resume=True).result == result


def test_ctrl_c_leaves_the_job_running(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(host, tmp_path, epochs=12)))
    command = [sys.executable, "-m", "tunefork", "train", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "--resume" in err and "hosted cancel" in err
    assert json.loads((tmp_path / "run" / "hosted.json").read_text())["job"]["status"] != "cancelled"
    assert cancel_hosted(tmp_path / "run") == "cancelled"


def test_preferences_are_sent_as_dpo(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"Is {i} blue?"}]},
            "preferred_output": [{"role": "assistant", "content": "Yes."}],
            "non_preferred_output": [{"role": "assistant", "content": "No."}],
        }
        for i in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = recipe(host, tmp_path, epochs=1) | {"task": "preference", "data": {"train": str(file)}}
    result = finetune(given).result
    assert result["hosted"]["hyperparameters"]["beta"] == 0.1
    assert result["test"] == {}
    assert (tmp_path / "run" / "report.html").exists()


def test_cancelled_on_request(host: Host, tmp_path: Path) -> None:
    given = recipe(host, tmp_path, epochs=40)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            finetune(given)
        except HostedError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    state = tmp_path / "run" / "hosted.json"
    wait_for(lambda: state.exists() and json.loads(state.read_text())["job"] is not None)
    assert cancel_hosted(tmp_path / "run") == "cancelled"
    thread.join(60)
    assert "cancelled" in str(caught[0])
    assert cancel_hosted(tmp_path / "run") == "cancelled"  # it has ended; nothing is asked for again


def test_a_job_that_the_host_fails_says_why(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunefork.workflows import hosted_plan

    rules = hosted_plan.find_format("openai").model_copy(update={"least": 1})
    monkeypatch.setattr(hosted_plan, "find_format", lambda name: rules)  # what the host refuses, this side lets pass
    given = recipe(host, tmp_path)
    given["data"] |= {"train": str(things(tmp_path, 12)), "test_fraction": 0.2}
    with pytest.raises(HostedError, match="must have at least 10 examples"):
        finetune(given)
    assert json.loads((tmp_path / "run" / "hosted.json").read_text())["job"]["status"] == "failed"


def test_a_file_that_the_host_rejects(host: Host, tmp_path: Path) -> None:
    host.fault = lambda method, path, times: (
        refusal(400, "invalid_file", "Line 3 is not to our liking") if method == "POST" and path == "/files" else None
    )
    with pytest.raises(HostedError, match="Line 3 is not to our liking"):
        finetune(recipe(host, tmp_path))
    state = json.loads((tmp_path / "run" / "hosted.json").read_text())
    assert (state["job"], "training_file" in state) == (None, False)
    assert host.requests.total() == 2  # looked for, then sent; a refusal is not tried again


def test_what_is_refused_before_anything_is_sent(host: Host, tmp_path: Path) -> None:
    given = recipe(host, tmp_path)
    with pytest.raises(RecipeError, match="learning_rate_multiplier"):
        finetune({**given, "train": {"method": "hosted", "learning_rate": 1e-4}})
    with pytest.raises(RecipeError, match="service's model"):
        finetune({**given, "model": "embedded"})
    with pytest.raises(DataError, match="at least 10 examples"):
        own = {"method": "hosted", "learning_rate": None}  # a service's own rate is what null asks for
        finetune({**given, "train": own, "data": {"train": str(things(tmp_path, 12))}})
    things(tmp_path)
    with pytest.raises(RecipeError, match="confirmed"):
        finetune({**given, "hosted": {"cache": str(tmp_path)}}, listener=Listener())
    with pytest.raises(RecipeError, match="no price is known"):
        finetune({**given, "model": "nebius:x", "hosted": {"limit": 5, "cache": str(tmp_path)}})
    assert not host.heard
    assert not (tmp_path / "run").exists()


def test_a_revoked_key_ends_it_with_a_sentence(host: Host, tmp_path: Path) -> None:
    def fault(method: str, path: str, times: int) -> Any:
        if path.endswith("/events"):
            host.keys.clear()
        return None

    host.fault = fault
    with pytest.raises(HostedError, match="401") as caught:
        finetune(recipe(host, tmp_path))
    assert KEY not in str(caught.value)
    host.fault, host.keys = (lambda method, path, times: None), {KEY}
    time.sleep(0.5)
    assert finetune(recipe(host, tmp_path), resume=True).result["test"]
    assert host.heard["POST /fine_tuning/jobs"] == 1
