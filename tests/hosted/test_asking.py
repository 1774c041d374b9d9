"""A hosted model is asked the same examples and measured the same way; against a fake host, and against our own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosted.host import KEY, Host, hosting, refusal
from tests.server.scenes import client_of, serving, settings_in
from tunefork.cli import main
from tunefork.errors import RecipeError
from tunefork.recipe import make_recipe
from tunefork.workflows import evaluate

REVIEWS = [("a lovely film", "1"), ("a dull film", "0"), ("lovely and warm", "1"), ("dull and cold", "0")]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("TUNEFORK_API_KEY", KEY)
    with hosting() as host:
        host.answer = lambda body: "great" if "lovely" in body["messages"][-1]["content"] else "terrible"
        yield host


def reviews(folder: Path) -> Path:
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in REVIEWS))
    return file


def recipe(folder: Path, task: Any = "sst2", **hosted: Any) -> Any:
    return make_recipe(
        {"task": task, "data": {"test": str(reviews(folder))}, "hosted": {"cache": str(folder / "cache"), **hosted}}
    )


def test_labels_are_asked_for_and_scored(host: Host, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []
    said = host.answer
    host.answer = lambda body: bodies.append(body) or said(body)  # type: ignore[func-returns-value]
    found = evaluate(f"{host.url}#m", recipe=recipe(tmp_path), confirm=lambda estimate: estimate.requests == 4)
    assert found.metrics["accuracy"]["value"] == 1
    assert [p.predicted for p in found.predictions] == ["great", "terrible", "great", "terrible"]
    assert bodies[0]["messages"][0]["content"].endswith("terrible, great.")
    assert bodies[0]["messages"][1] == {"role": "user", "content": "a lovely film It was"}
    assert (bodies[0]["temperature"], bodies[0]["logprobs"], bodies[0]["top_logprobs"]) == (0, True, 20)
    evaluate(f"{host.url}#m", recipe=recipe(tmp_path))  # from the cache: nothing to confirm
    assert sum(host.asked.values()) == 4
    evaluate(f"{host.url}#m", recipe=recipe(tmp_path, system="Else."), confirm=lambda estimate: True)
    assert sum(host.asked.values()) == 8  # another content, another question


def test_it_must_be_confirmed_unless_a_limit_says_so(host: Host, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="4 requests"):
        evaluate(f"{host.url}#m", recipe=recipe(tmp_path))
    assert not host.asked
    assert evaluate(f"{host.url}#m", recipe=recipe(tmp_path, limit=1)).metrics["accuracy"]["value"] == 1


def test_a_refused_row_and_an_answer_beside_the_labels_are_told(host: Host, tmp_path: Path) -> None:
    host.answer = lambda body: "no idea" if "cold" in body["messages"][-1]["content"] else "great"
    host.fault = lambda m, p, t: refusal(400, "filtered", "no such text") if host.asked.total() == 1 else None
    found = evaluate(f"{host.url}#m", recipe=recipe(tmp_path, concurrency=1, limit=1))
    refused, missed = found.notes[:2]
    assert "no such text" in refused
    assert missed.startswith("4 of 4") or "name no label" in missed
    assert found.predictions[3].probabilities == (0.5, 0.5)


def test_answered_rows_are_shown_first(host: Host, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(
        "".join(json.dumps({"text": f"a {w} day", "label": "01"[w == "fine"]}) + "\n" for w in ("fine", "sad"))
    )
    given = recipe(tmp_path, limit=1)
    given = given.model_copy(update={"data": given.data.model_copy(update={"train": str(train)})})
    found = evaluate(f"{host.url}#m", recipe=given, shots=2)
    (asked,) = [question for question in host.asked if question.endswith("a lovely film It was")]
    assert sorted(asked.split("\n\n")[:-1]) == ["a fine day It was great", "a sad day It was terrible"]
    assert found.metrics["accuracy"]["value"] == 1
    here = evaluate("embedded", recipe=given, shots=2)
    assert "2 demonstrations from train" in here.notes[0]
    assert here.predictions != evaluate("embedded", recipe=given).predictions
    with pytest.raises(RecipeError, match="answered rows of a train file"):
        evaluate(f"{host.url}#m", recipe=recipe(tmp_path), shots=2)


def test_text_is_generated_and_measured(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"prompt": "say hi", "completion": "HI"}\n{"prompt": "say no", "completion": "NO"}\n')
    host.answer = lambda body: body["messages"][-1]["content"].split()[1].upper()
    task = {"name": "generation", "metric": "exact_match", "prompt": "{{ prompt }}", "stop": ["\n"]}
    found = evaluate(f"{host.url}#m", file, recipe=recipe(tmp_path, task, limit=1))
    assert found.metrics["exact_match"]["value"] == 1
    assert found.predictions[0].stopped
    assert found.predictions[0].loss is None


def test_the_command(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", f"{host.url}#m", "--task", "sst2", "--test", str(reviews(tmp_path)), "--yes"]
    main_exit = pytest.raises(SystemExit)
    with main_exit as caught:
        main([*words, "--set", f"hosted.cache={tmp_path / 'cache'}", "--json"])
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    assert json.loads(out)["test"]["accuracy"]["value"] == 1
    assert "4 requests" in err
    assert KEY not in out + err


def test_the_same_probabilities_as_at_home(tmp_path: Path) -> None:
    """Against our own server: shares from top_logprobs are those of the candidates' likelihood at home."""
    questions = [f"Which word comes after {word}?" for word in ("this", "that", "these")]
    with serving(settings_in(tmp_path / "data")) as url:
        labels = _common_words(client_of(url), questions)
        file = tmp_path / "q.jsonl"
        file.write_text("".join(json.dumps({"text": q, "label": labels[0]}) + "\n" for q in questions))
        base = {
            "task": {"name": "classification", "prompt": "{{ text }}", "chat_template": True},
            "data": {"test": str(file), "labels": {label: label for label in labels}},
            "hosted": {"cache": str(tmp_path / "cache"), "system": "", "limit": 0},
        }
        there = evaluate(f"{url}#fork-tiny", recipe=base)
    here = evaluate("embedded", recipe=base)
    for ours, theirs in zip(here.predictions, there.predictions, strict=True):
        assert theirs.probabilities == pytest.approx(ours.probabilities, abs=2e-3)
        assert theirs.predicted == ours.predicted


def _common_words(client: Any, questions: list[str]) -> list[str]:
    """Words that are one token and likely as the first one of every reply, none the beginning of another likely one."""
    tops = []
    for question in questions:
        reply = client.chat.completions.create(
            model="fork-tiny",
            messages=[{"role": "user", "content": question}],
            max_tokens=1,
            temperature=0,
            logprobs=True,
            top_logprobs=20,
        )
        tops.append({t.token: math.exp(t.logprob) for t in reply.choices[0].logprobs.content[0].top_logprobs})
    seen = [token.strip().casefold() for token in {token for top in tops for token in top}]
    common = set(tops[0]).intersection(*tops)
    alone = [
        token
        for token in sorted(common, key=lambda t: -tops[0][t])
        if token.isalpha()
        and sum(token.casefold().startswith(s) or s.startswith(token.casefold()) for s in seen if s) == 1
    ]
    assert len(alone) >= 2, "the tiny model has no two such words"
    return alone[:3]
