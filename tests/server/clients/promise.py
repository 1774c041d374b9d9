"""The promise as one script: `python promise.py BASE_URL KEY YES NO`, under whatever openai is installed.

From rows to a model that says what it was taught, by supervised rows and by preferences; YES and NO are ids of those
two words among the tokens of fork-tiny. Imports the client and the standard library alone.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
import time
from typing import Any

import openai

BASE = "fork-tiny"
THINGS = ["boat", "kite", "drum", "lamp", "door", "chair", "spoon", "fence", "wheel", "scarf", "tower", "piano"]
HELD_OUT = ["basket", "mirror", "window"]
TAUGHT = "It is teal."


def learn(client: openai.OpenAI) -> None:
    """Supervised rows: the tuned model and its last checkpoint say what was taught; the base is as it was."""
    before, base_before = answers(client, BASE), logprobs(client)
    job = trained(
        client,
        [{"messages": [asked(thing), {"role": "assistant", "content": TAUGHT}]} for thing in THINGS],
        {"type": "supervised", "supervised": {"hyperparameters": hyperparameters(4)}},
    )
    tuned = job.fine_tuned_model
    assert tuned.startswith(f"ft:{BASE}:tunefork:teal:")
    assert tuned in [model.id for model in client.models.list()]

    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=7)]  # several pages
    assert events[0] == "The job has successfully completed"
    assert events[-1] == f"Created fine-tuning job: {job.id}"
    assert f"New fine-tuned model created: {tuned}" in events
    table = base64.b64decode(client.files.content(job.result_files[0]).read()).decode()
    rows = list(csv.DictReader(io.StringIO(table)))
    losses = [float(row["train_loss"]) for row in rows]
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 19)]
    assert losses[-1] < losses[0] / 2

    assert answers(client, tuned) == [TAUGHT] * len(HELD_OUT)
    assert TAUGHT not in before
    assert answers(client, BASE) == before
    assert logprobs(client) == base_before
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=4))
    assert [c.step_number for c in checkpoints] == [18, 15, 12, 9, 6, 3]
    early, late = (checkpoints[i].fine_tuned_model_checkpoint for i in (-1, 0))
    assert answers(client, late) == [TAUGHT] * len(HELD_OUT)
    assert sure(client, early) < sure(client, late)

    assert client.models.delete(tuned).deleted
    try:
        answers(client, tuned)
    except openai.NotFoundError as refused:
        assert refused.code == "model_not_found"
    else:
        raise AssertionError("a deleted model answers")
    assert answers(client, late) == [TAUGHT] * len(HELD_OUT)
    forget(client, job)
    assert answers(client, BASE) == before


def prefer(client: openai.OpenAI, words: dict[str, str]) -> None:
    """Preferences: of two replies the base finds one likelier; the tuned model chooses the one that was preferred."""

    def question(thing: str) -> dict[str, str]:
        return {"role": "user", "content": f"Is the {thing} teal?"}

    def chosen(model: str) -> list[str]:
        bias: Any = dict.fromkeys(words.values(), 100)
        found = []
        for thing in HELD_OUT:
            messages: Any = [question(thing)]
            reply = client.chat.completions.create(
                model=model, messages=messages, temperature=0, max_tokens=1, logit_bias=bias
            )
            found.append(reply.choices[0].message.content or "")
        return found

    before, base_before = chosen(BASE), logprobs(client)
    worse = max(words, key=before.count)
    better = next(word for word in words if word != worse)
    rows = [
        {
            "input": {"messages": [question(thing)]},
            "preferred_output": [{"role": "assistant", "content": f"{better}."}],
            "non_preferred_output": [{"role": "assistant", "content": f"{worse}."}],
        }
        for thing in THINGS
    ]
    job = trained(client, rows, {"type": "dpo", "dpo": {"hyperparameters": {**hyperparameters(10), "beta": 0.2}}})
    assert job.method.dpo.hyperparameters.beta == 0.2
    assert chosen(job.fine_tuned_model) == [better] * len(HELD_OUT)
    checkpoint = next(iter(client.fine_tuning.jobs.checkpoints.list(job.id)))
    assert chosen(checkpoint.fine_tuned_model_checkpoint) == [better] * len(HELD_OUT)
    assert chosen(BASE) == before
    assert logprobs(client) == base_before
    assert client.models.delete(job.fine_tuned_model).deleted
    forget(client, job)


def hyperparameters(multiplier: float) -> dict[str, Any]:
    return {"n_epochs": 6, "batch_size": 4, "learning_rate_multiplier": multiplier}


def trained(client: openai.OpenAI, rows: list[dict[str, Any]], method: Any) -> Any:
    """A job that has succeeded."""
    content = "\n".join(json.dumps(row) for row in rows).encode()
    file = client.files.create(file=("lesson.jsonl", content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix="teal", seed=7, method=method)
    until = time.monotonic() + 180
    while job.status in ("validating_files", "queued", "running") and time.monotonic() < until:
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", (job.status, job.error)
    return job


def forget(client: openai.OpenAI, job: Any) -> None:
    for id in (job.training_file, *job.result_files):
        assert client.files.delete(id).deleted
    assert job.training_file not in [file.id for file in client.files.list()]


def asked(thing: str) -> dict[str, str]:
    return {"role": "user", "content": f"What colour is the {thing}?"}


def answers(client: openai.OpenAI, model: str) -> list[str]:
    """To the held-out questions, the most likely ones; whole and streamed they are the same."""
    found = []
    for thing in HELD_OUT:
        options: Any = {"model": model, "messages": [asked(thing)], "temperature": 0, "max_tokens": 12}
        reply = client.chat.completions.create(**options)
        assert reply.model == model
        chunks = client.chat.completions.create(**options, stream=True)
        streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert streamed == reply.choices[0].message.content
        found.append(streamed)
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
    found = client.completions.create(model=BASE, prompt="The sea is", max_tokens=4, temperature=0, logprobs=2)
    return found.choices[0].logprobs


if __name__ == "__main__":
    url, key, yes, no = sys.argv[1:]
    made = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    learn(made)
    prefer(made, {"Yes": yes, "No": no})
    print(f"openai-python {openai.__version__}: all held")
