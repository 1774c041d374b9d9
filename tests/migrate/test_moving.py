"""The whole way out against our own server: inventory, record, retrain, compare, one page. And the dates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosted.host import KEY, Host, hosting, refusal
from tests.server.scenes import client_of, server_process, wait_for
from tunefork.cli import main
from tunefork.errors import MissingFileError, RecipeError, RunError
from tunefork.hosted import find_model
from tunefork.migrate import record
from tunefork.migrate.compare import compare, read_comparison
from tunefork.migrate.inventory import inventory, shutdown_of
from tunefork.migrate.retrain import retrain
from tunefork.report import render_migration


def rows(first: int, count: int) -> bytes:
    lines = []
    for i in range(first, first + count):
        colour = ("teal", "coral")[i % 2]
        asked = f"What colour is the {('reef', 'sea')[i % 2]} number {i}?"
        lines.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server, and a model that was tuned there."""
    with server_process(tmp_path_factory.mktemp("served") / "data") as (_, url):
        client = client_of(url)
        files = [
            client.files.create(file=(name, content), purpose="fine-tune").id
            for name, content in (("t.jsonl", rows(0, 24)), ("v.jsonl", rows(24, 8)))
        ]
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 4}}}
        job = client.fine_tuning.jobs.create(
            model="fork-tiny", training_file=files[0], validation_file=files[1], method=method, seed=1
        )
        wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"))
        model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
        assert model is not None
        yield url, model


@pytest.mark.slow
def test_the_whole_way_out(tuned: tuple[str, str], tmp_path: Path) -> None:
    url, model = tuned
    (found,) = [entry for entry in inventory(url, tmp_path / "inventory.json") if entry.model.endswith(model)]
    assert (found.base, found.answers, found.shutdown) == ("fork-tiny", True, None)
    assert found.validation_file is not None
    assert json.loads((tmp_path / "inventory.json").read_text())["models"][0]["model"] == found.model

    kept = record(found.model, tmp_path / "kept", confirm=lambda estimate: estimate.cost == 0)
    assert len(kept.rows) == 8
    assert kept.rows[0].reference == "teal"
    assert kept.rows[0].tokens[0]["top_logprobs"]
    assert kept.about["job"]["id"] == found.job

    with pytest.raises(MissingFileError, match="migrate compare"):
        read_comparison(tmp_path / "kept")
    sets = {"train.epochs": 4, "train.batch_size": 4, "data.dev_fraction": 0.2}
    again = retrain(tmp_path / "kept", "embedded", tmp_path / "runs", methods=["backprop/lora"], sets=sets)
    assert again["chosen"] == str(tmp_path / "runs" / "backprop-lora")
    assert retrain(tmp_path / "kept", "embedded", tmp_path / "runs", methods=["backprop/lora"], sets=sets) == again

    result = compare(tmp_path / "kept", again["chosen"])
    assert result["rows"] == result["scores"][0]["old"]["n"] == 8
    assert 0 <= result["agreement"]["exact_match"]["value"] <= 1
    score = result["scores"][0]
    assert score["difference"]["difference"] == pytest.approx(score["new"]["value"] - score["old"]["value"])
    assert result["loss_of_recorded_answers"] > 0
    same = compare(tmp_path / "kept", found.model, confirm=lambda estimate: True)
    assert same["agreement"]["exact_match"]["value"] == 1  # the recorded model agrees with itself
    assert same["changed"] == []
    with pytest.raises(RunError, match="must fit"):
        retrain(tmp_path / "kept", "embedded", tmp_path / "none", methods=[], sets=sets)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("TUNEFORK_API_KEY", KEY)
    with hosting() as host:
        yield host


def test_what_differs_is_found_and_shown(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Old and new agree on all but three prompts, where the old one was right."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_bytes(rows(0, 40))

    def colour(body: dict[str, Any]) -> str:
        number = int(body["messages"][-1]["content"].rstrip("?").split()[-1])
        wrong = body["model"] == "new" and number in (3, 17, 20)
        return "<b>grey</b>" if wrong else ("teal", "coral")[number % 2]

    host.answer = colour
    record(f"{host.url}#old", tmp_path / "kept", prompts, confirm=lambda estimate: True)
    words = ["migrate", "compare", str(tmp_path / "kept"), "--model", f"{host.url}#new", "--yes", "--json"]
    with pytest.MonkeyPatch.context() as home, pytest.raises(SystemExit) as caught:
        home.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        main(words)
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    result = json.loads(out)
    assert result["agreement"]["exact_match"]["value"] == pytest.approx(37 / 40)
    assert result["scores"][0]["old"]["value"] == 1
    assert result["scores"][0]["difference"]["difference"] == pytest.approx(-3 / 40)
    assert {row["source"].rpartition(":")[2] for row in result["changed"]} == {"4", "18", "21"}
    assert [part["name"] for part in result["sure"]] == ["sure"]
    page = (tmp_path / "kept" / "migration.html").read_text()
    assert "92\u202f% of 40 prompts" in page or "93\u202f% of 40 prompts" in page
    assert "&lt;b&gt;grey" in page and "<b>grey" not in page
    assert "<script" not in page and "http-equiv" in page
    assert KEY not in page + out + err
    assert "gives the same answer to 9" in err  # results alone on stdout
    both = render_migration([result, {**result, "scores": []}])
    assert "2 models compared: 1 without a clear difference in right answers, 1 not measured" in both


def test_a_limit_on_the_new_model_and_prompts_that_are_left_out(host: Host, tmp_path: Path) -> None:
    """A prompt with an image, one that the new model refuses; tools are shown to both; answers may be as long."""
    prompts, tool = tmp_path / "p.jsonl", {"type": "function", "function": {"name": "f", "parameters": {}}}
    image = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
    asked = [f"say {word}" for word in ("red", "blue", "green")] + [[{"type": "text", "text": "see"}, image]]
    lines = [{"messages": [{"role": "user", "content": a}], "tools": [tool]} for a in asked]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bodies: list[dict[str, Any]] = []
    host.answer = lambda body: bodies.append(body) or "red"  # type: ignore[func-returns-value]
    record(f"{host.url}#old", tmp_path / "kept", prompts, max_tokens=2000, confirm=lambda estimate: True)
    table = tmp_path / "prices.yaml"
    table.write_text('date: "2026-11-26"\nsource: a test\nmodels:\n  127.0.0.1: {new: {input: 10, output: 100}}\n')
    words = ["migrate", "compare", str(tmp_path / "kept"), "--model", f"{host.url}#new", "--prices", str(table)]
    words += ["--set", f"hosted.cache={tmp_path / 'cache'}", "--json"]
    before = len(bodies)
    with pytest.raises(SystemExit) as caught:
        main([*words, "--limit", "0.001"])
    assert (caught.value.code, len(bodies)) == (1, before)
    host.fault = lambda method, path, times: (
        refusal(400, "filtered") if len(bodies) == before + 1 and times == 1 else None
    )
    with pytest.raises(SystemExit) as caught:
        main([*words, "--limit", "5", "--set", "hosted.concurrency=1"])
    assert caught.value.code == 0
    result = read_comparison(tmp_path / "kept")
    assert (result["rows"], result["left_out"], result["cut_short"]) == (1, 3, 0)
    assert {(body["max_tokens"], len(body["tools"])) for body in bodies[before:]} == {(2000, 1)}
    assert "3 prompts that were refused" in (tmp_path / "kept" / "migration.html").read_text()


def test_a_recording_without_a_job_must_be_told_its_files(host: Host, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_bytes(rows(0, 2))
    record(f"{host.url}#old", tmp_path / "kept", prompts, confirm=lambda estimate: True)
    with pytest.raises(RecipeError, match="--train FILE"):
        retrain(tmp_path / "kept", "embedded", tmp_path / "runs", methods=["backprop/lora"])
    with pytest.raises(RecipeError, match="--prompts FILE"):
        record(f"{host.url}#plain", tmp_path / "other", confirm=lambda estimate: True)


@pytest.mark.slow
def test_what_was_tuned_by_dpo_is_trained_by_dpo(host: Host, tmp_path: Path) -> None:
    prompts, pairs = tmp_path / "p.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_bytes(rows(0, 3))
    reply = {
        side: [{"role": "assistant", "content": text}]
        for side, text in (("preferred_output", "Yes."), ("non_preferred_output", "No."))
    }
    asked = [{"input": {"messages": [{"role": "user", "content": f"Is {i} blue?"}]}, **reply} for i in range(20)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in asked))
    record(f"{host.url}#old", tmp_path / "kept", prompts, confirm=lambda estimate: True)
    about = json.loads((tmp_path / "kept" / "recording.json").read_text())
    (tmp_path / "kept" / "recording.json").write_text(
        json.dumps(about | {"job": {"id": "j", "method": {"type": "dpo"}}})
    )
    options: dict[str, Any] = {"train": pairs, "methods": ["backprop/lora"], "sets": {"train.max_steps": 2}}
    chosen = retrain(tmp_path / "kept", "embedded", tmp_path / "runs", **options)["chosen"]
    result = compare(tmp_path / "kept", chosen)
    assert (result["rows"], len(result["changed"])) == (3, 3)
    assert all(row["after"] for row in result["changed"])


def test_the_days_on_which_models_stop() -> None:
    days = {
        "openai:ft:gpt-4o-mini-2024-07-18:acme::1": "2027-01-14",
        "openai:ft:gpt-4.1-2025-04-14:acme::1": "2027-01-14",
        "openai:gpt-4o-2024-05-13": "2026-10-23",
        "openai:ft:gpt-3.5-turbo-0125:acme::1": "2026-10-23",
        "openai:gpt-6-luna": None,
        "nebius:gpt-4o": None,
    }
    assert {name: shutdown_of(find_model(name)) for name in days} == days
