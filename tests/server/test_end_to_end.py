"""The promise: the official client, unchanged, from rows to a model that does what it was taught; a real process."""

from __future__ import annotations

import base64
import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.scenes import client_of, server_process, wait_for
from tunefork.models import inspect_model, load_tokenizer
from tunefork.recipe import ModelSection

THINGS = ["boat", "kite", "drum", "lamp", "door", "chair", "spoon", "fence", "wheel", "scarf", "tower", "piano"]
HELD_OUT = ["basket", "mirror", "window"]
TAUGHT = "It is teal."


def asked(thing: str) -> dict[str, str]:
    return {"role": "user", "content": f"What colour is the {thing}?"}


def lesson() -> bytes:
    rows = [{"messages": [asked(thing), {"role": "assistant", "content": TAUGHT}]} for thing in THINGS]
    return "\n".join(json.dumps(row) for row in rows).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with server_process(tmp_path_factory.mktemp("served") / "data") as (process, url):
        yield process, url


def answers(client: openai.OpenAI, model: str) -> list[str]:
    """To the held-out questions, the most likely ones."""
    found = []
    for thing in HELD_OUT:
        messages: Any = [asked(thing)]
        reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)
        assert reply.model == model
        found.append(reply.choices[0].message.content or "")
    return found


def sure(client: openai.OpenAI, model: str) -> float:
    """Log-probability of the reply to the first held-out question."""
    messages: Any = [asked(HELD_OUT[0])]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12, logprobs=True)
    found = reply.choices[0].logprobs
    assert found is not None and found.content is not None
    return sum(token.logprob for token in found.content)


def logprobs(client: openai.OpenAI) -> Any:
    """Of the base, for a text: bit for bit the same as long as it is the same."""
    found = client.completions.create(model="fork-tiny", prompt="The sea is", max_tokens=4, temperature=0, logprobs=2)
    return found.choices[0].logprobs


def test_from_rows_to_a_model_that_has_learned(server: tuple[subprocess.Popen[bytes], str]) -> None:
    client = client_of(server[1])
    before, base_before = answers(client, "fork-tiny"), logprobs(client)

    file = client.files.create(file=("lesson.jsonl", lesson()), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 6, "batch_size": 4, "learning_rate_multiplier": 4}
    job = client.fine_tuning.jobs.create(
        model="fork-tiny",
        training_file=file.id,
        suffix="teal",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), 120)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None

    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert events[0] == "The job has successfully completed"
    assert f"New fine-tuned model created: {job.fine_tuned_model}" in events
    table = base64.b64decode(client.files.content(job.result_files[0]).read()).decode()
    losses = [float(row["train_loss"]) for row in csv.DictReader(io.StringIO(table))]
    assert len(losses) == 18
    assert losses[-1] < losses[0] / 2

    assert answers(client, job.fine_tuned_model) == [TAUGHT] * len(HELD_OUT)
    assert TAUGHT not in before
    assert answers(client, "fork-tiny") == before
    assert logprobs(client) == base_before
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [c.step_number for c in checkpoints] == [18, 15, 12, 9, 6, 3]
    assert answers(client, checkpoints[0].fine_tuned_model_checkpoint) == [TAUGHT] * len(HELD_OUT)
    early, late = (sure(client, checkpoints[i].fine_tuned_model_checkpoint) for i in (-1, 0))
    assert early < late

    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        answers(client, job.fine_tuned_model)
    assert answers(client, checkpoints[0].fine_tuned_model_checkpoint) == [TAUGHT] * len(HELD_OUT)
    assert client.files.delete(file.id).deleted
    assert answers(client, "fork-tiny") == before


@pytest.mark.slow
def test_a_preference_is_learned(server: tuple[subprocess.Popen[bytes], str]) -> None:
    """Of two replies the base finds one likelier; the other is what people preferred."""
    client = client_of(server[1])
    tokenizer = load_tokenizer(inspect_model(ModelSection()))
    words = {word: tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")}

    def chosen(model: str, thing: str) -> str:
        messages: Any = [{"role": "user", "content": f"Is the {thing} teal?"}]
        bias: Any = dict.fromkeys(map(str, words.values()), 100)
        found = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=1, logit_bias=bias
        )
        return found.choices[0].message.content or ""

    before = [chosen("fork-tiny", thing) for thing in HELD_OUT]
    worse = max(words, key=before.count)
    better = next(word for word in words if word != worse)
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"Is the {thing} teal?"}]},
            "preferred_output": [{"role": "assistant", "content": f"{better}."}],
            "non_preferred_output": [{"role": "assistant", "content": f"{worse}."}],
        }
        for thing in THINGS
    ]
    content = "\n".join(json.dumps(row) for row in rows).encode()
    file = client.files.create(file=("preferences.jsonl", content), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": 6, "batch_size": 4, "learning_rate_multiplier": 10, "beta": 0.2}
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    job = client.fine_tuning.jobs.create(model="fork-tiny", training_file=file.id, method=method, seed=7)
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), 120)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None
    assert job.method is not None and job.method.dpo is not None and job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.2
    assert [chosen(job.fine_tuned_model, thing) for thing in HELD_OUT] == [better] * len(HELD_OUT)
    assert [chosen("fork-tiny", thing) for thing in HELD_OUT] == before


def test_the_server_ends_when_it_is_asked_to(server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = server
    messages: Any = [asked("sea")]
    stream = client_of(url).chat.completions.create(
        model="fork-tiny", messages=messages, stream=True, logit_bias={"2": -100}
    )
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_without_the_extra_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from tunefork.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "serve", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'tunefork[server]'" in done.stderr


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "tunefork", "keys", *words, "--data", str(tmp_path / "data")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    made = json.loads(run("create", "--project", "proj_a", "--scopes", "model.request", "--json"))
    assert made["key"].startswith("sk-tf-")
    run("revoke", made["id"])
    (listed,) = json.loads(run("list", "--json"))
    assert (listed["id"], listed["scopes"]) == (made["id"], ["model.request"])
    assert listed["revoked_at"] is not None
    assert made["key"] not in json.dumps(listed)
