"""Jobs before anything is trained: what is accepted, validated, listed and steered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.scenes import client_of, rows, serving, settings_in, wait_for
from tunefork.server import Catalogue

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, database: str | None) -> Iterator[openai.OpenAI]:
    catalogue = Catalogue(aliases={"gpt-4o-mini": "fork-tiny"})
    with serving(settings_in(tmp_path_factory.mktemp("data"), catalogue=catalogue, database=database)) as url:
        yield client_of(url)


@pytest.fixture(scope="module")
def file(client: openai.OpenAI) -> str:
    return client.files.create(file=("t.jsonl", rows()), purpose="fine-tune").id


def settled(client: openai.OpenAI, id: str) -> Any:
    """The job once its files are validated."""
    wait_for(lambda: client.fine_tuning.jobs.retrieve(id).status != "validating_files")
    return client.fine_tuning.jobs.retrieve(id)


def test_a_job_is_queued_with_every_value_told(client: openai.OpenAI, file: str) -> None:
    made = client.fine_tuning.jobs.create(
        model="gpt-4o-mini", training_file=file, suffix="../my model", metadata={"team": "a"}, seed=7
    )
    assert (made.status, made.model, made.seed, made.metadata) == ("validating_files", "fork-tiny", 7, {"team": "a"})
    assert made.model_extra["tunefork"]["requested_model"] == "gpt-4o-mini"
    job = settled(client, made.id)
    assert job.status == "queued"
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (10, 1)  # 100 examples seen
    assert job.method.supervised.hyperparameters.learning_rate_multiplier == 1.0
    messages = [e.message for e in client.fine_tuning.jobs.list_events(made.id)]
    assert messages == [
        "Files validated, moving job to queued state",
        f"Validating training file: {file}",
        f"Created fine-tuning job: {made.id}",
    ]


def test_lists_filter_by_metadata(client: openai.OpenAI, file: str) -> None:
    for number in range(3):
        pairs = {"list": "yes", "number": str(number)}
        client.fine_tuning.jobs.create(model="fork-tiny", training_file=file, metadata=pairs)
    bare = client.fine_tuning.jobs.create(model="fork-tiny", training_file=file)
    found = [job.metadata["number"] for job in client.fine_tuning.jobs.list(metadata={"list": "yes"}, limit=2)]
    assert found == ["2", "1", "0"]
    assert [j.metadata for j in client.fine_tuning.jobs.list(metadata={"list": "yes", "number": "1"})] == [
        {"list": "yes", "number": "1"}
    ]
    assert bare.id in [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})]
    assert all(not job.metadata for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"}))


@pytest.mark.parametrize("key", ["", '"', "\\"])
def test_a_filter_that_cannot_be_meant_is_refused(client: openai.OpenAI, key: str) -> None:
    with pytest.raises(openai.BadRequestError, match="key to filter by"):
        client.fine_tuning.jobs.list(extra_query={f"metadata[{key}]": "x"})
    with pytest.raises(openai.BadRequestError, match=r"metadata\[key\]=value"):
        client.fine_tuning.jobs.list(extra_query={"metadata": key or "x"})


def test_pause_resume_and_cancel(client: openai.OpenAI, file: str) -> None:
    jobs = client.fine_tuning.jobs
    id = jobs.create(model="fork-tiny", training_file=file).id
    settled(client, id)
    assert jobs.pause(id).status == "paused"
    assert jobs.pause(id).status == "paused"
    assert jobs.resume(id).status == "queued"
    assert jobs.cancel(id).status == "cancelled"
    assert jobs.cancel(id).finished_at is not None
    for refused in (jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError, match="that is cancelled"):
            refused(id)
    assert jobs.list_events(id).data[0].message == "The job was cancelled"


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"model": "gpt-9"}, "model", "model_not_found"),
        ({"model": "ft:fork-tiny:a::b"}, "model", "model_not_available"),
        ({"training_file": "file-none"}, "training_file", "invalid_file"),
        ({"validation_file": "../x"}, "validation_file", "invalid_file"),
        ({"suffix": ""}, "suffix", "string_below_min_length"),
        ({"suffix": "x" * 65}, "suffix", "string_above_max_length"),
        ({"seed": -1}, "seed", "integer_below_min_value"),
        ({"seed": 2**31}, "seed", "integer_above_max_value"),
        ({"seed": "1"}, "seed", "invalid_type"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "integer_above_max_value"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "integer_below_min_value"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "invalid_type"),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size", "invalid_type"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier", None),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "string_above_max_length"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "array_above_max_length"),
        ({"integrations": [{"type": "mlflow"}]}, "integrations[0].type", "invalid_value"),
        ({"method": {"type": "ppo"}}, "method.type", "invalid_value"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method", "unsupported_method"),
        ({"method": {"type": "reinforcement"}}, "method", "invalid_value"),
        ({"extra": 1}, "extra", "unknown_parameter"),
        ({"tunefork": {"adapter": "prefix"}}, "tunefork", "invalid_value"),
        ({"tunefork": {"adapter": "none"}, "method": {"type": "dpo"}}, "tunefork", "invalid_value"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.5}}}}, None, "decimal_above_max_value"),
        ({"tunefork": {"adapter": {"rank": 0}}}, "tunefork", "invalid_value"),
        ({"tunefork": {"train": {"batch_size": 2}}}, "tunefork", "invalid_value"),
        ({"tunefork": {"train": {"method": "guess"}}}, "tunefork", "invalid_value"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    client: openai.OpenAI, file: str, given: dict[str, Any], param: str | None, code: str | None
) -> None:
    body = {"model": "fork-tiny", "training_file": file, **given}
    with pytest.raises(openai.APIStatusError) as refused:
        client.post("/fine_tuning/jobs", body=body, cast_to=object)
    assert refused.value.status_code in (400, 404)
    assert (refused.value.param, refused.value.code) == (param or refused.value.param, code or refused.value.code)


def chat(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


GOOD = rows().split(b"\n")
BAD = {
    "no JSON": (b"{", "Line 11 is not valid JSON"),
    "no object": (b"[1]", "Line 11 is not a dictionary"),
    "not UTF-8": (b"\xff\xfe", "not UTF-8"),
    "deep": (b"[" * 200_000, "not valid JSON"),
    "no role": (chat({"content": "x"}, REPLY), "Example 11, message 1 Discriminator 'role' is missing in value"),
    "a role of another kind": (chat({"role": "bot", "content": "x"}, REPLY), "Input tag 'bot'"),
    "no reply": (chat(USER), "last message must be from the assistant"),
    "nothing to learn": (chat(USER, {**REPLY, "weight": 0}), "weight that is not 0"),
    "a weight of another kind": (chat(USER, {**REPLY, "weight": 0.5}), "weight must be 0 or 1"),
    "a weight of the user's": (chat({**USER, "weight": 1}, REPLY), "weight must be 0 or 1"),
    "an image": (chat({**USER, "content": [{"type": "image_url"}]}, REPLY), "text parts"),
    "a number": (chat({**USER, "content": 3}, REPLY), "content must be text"),
    "nothing": (chat({**USER, "content": " "}, REPLY), "must not be empty"),
    "no messages": (chat(), "list that is not empty"),
    "tools of another kind": (chat(USER, REPLY, tools="x"), "tools must be"),
    "another layout": (b'{"prompt": "a", "completion": "b"}', "of the format completion"),
    "no layout": (
        b'{"text": "a"}',
        "Unexpected file format, expected either prompt/completion pairs or chat messages.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(client: openai.OpenAI, name: str) -> None:
    line, said = BAD[name]
    data = b"\n".join([*GOOD, line])
    id = client.files.create(file=("t.jsonl", data), purpose="fine-tune").id
    job = settled(client, client.fine_tuning.jobs.create(model="fork-tiny", training_file=id).id)
    assert (job.status, job.error.code, job.error.param) == ("failed", "invalid_training_file", "training_file")
    assert said in job.error.message
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


def test_too_few_examples_and_the_wrong_method(client: openai.OpenAI, file: str) -> None:
    few = client.files.create(file=("t.jsonl", rows(7)), purpose="fine-tune").id
    job = settled(client, client.fine_tuning.jobs.create(model="fork-tiny", training_file=few).id)
    assert job.error.code == "invalid_n_examples"
    assert job.error.message == "Training file has 7 example(s), but must have at least 10 examples"
    valid = client.files.create(file=("t.jsonl", b""), purpose="fine-tune").id
    made = client.fine_tuning.jobs.create(model="fork-tiny", training_file=file, validation_file=valid)
    assert settled(client, made.id).error.param == "validation_file"
    pairs = {"input": {"messages": [USER]}, "preferred_output": [REPLY], "non_preferred_output": [REPLY]}
    preference = client.files.create(
        file=("t.jsonl", b"\n".join([json.dumps(pairs).encode()] * 10)), purpose="fine-tune"
    )
    job = settled(client, client.fine_tuning.jobs.create(model="fork-tiny", training_file=preference.id).id)
    assert "is not using 'dpo' as the training method (provided method=supervised)" in job.error.message


def test_what_a_job_reads_is_its_own_until_it_has_ended(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "data")
    with serving(settings) as url:
        client = client_of(url)
        ids = [client.files.create(file=("t.jsonl", rows(n)), purpose="fine-tune").id for n in (10, 5)]
        jobs = [client.fine_tuning.jobs.create(model="fork-tiny", training_file=id).id for id in ids]
        for id in ids:
            client.files.delete(id)
        assert [settled(client, id).status for id in jobs] == ["queued", "failed"]  # both were read
    with serving(settings) as url:
        wait_for(lambda: not list((settings.jobs_path / jobs[1]).glob("*.jsonl")))
        assert (settings.jobs_path / jobs[0] / "train.jsonl").read_bytes() == rows(10)


def test_a_file_must_be_for_training(client: openai.OpenAI) -> None:
    id = client.files.create(file=("t.jsonl", rows()), purpose="user_data").id
    with pytest.raises(openai.BadRequestError, match="purpose 'fine-tune'"):
        client.fine_tuning.jobs.create(model="fork-tiny", training_file=id)
