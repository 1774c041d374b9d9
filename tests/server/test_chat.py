"""Answers of the embedded model: greedy and drawn, whole and streamed, alone and together, with log-probabilities."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import torch

from tests.server.scenes import client_of, serving, settings_in, wait_for
from tunefork.models import load_tokenizer
from tunefork.models.base import load_base
from tunefork.models.facts import inspect_model
from tunefork.recipe import ModelSection
from tunefork.server import Catalogue, Settings
from tunefork.server.inference.rows import Piece, Row, Sampling

ASKED: Any = [{"role": "user", "content": "Hello, who are you?"}]
ENDLESS = {str(token): -100 for token in (2, 4, 5, 6)}  # ends and turns


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_in(tmp_path_factory.mktemp("data"), waiting_rows=40)


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    with serving(settings) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def said(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "fork-tiny", "messages": ASKED, "max_tokens": 24, **options})


def texts(reply: Any) -> list[str]:
    return [choice.message.content for choice in reply.choices]


def streamed(chunks: Any) -> dict[int, str]:
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
    return found


def test_the_most_likely_tokens_are_those_of_the_model_itself(client: openai.OpenAI) -> None:
    """Ids by the chat template and an own loop over transformers, no code of the server's."""
    facts = inspect_model(ModelSection())
    tokenizer: Any = load_tokenizer(facts)
    model = load_base(facts, "text", (), torch.device("cpu"), torch.float32)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    start = ids.shape[1]
    for _ in range(24):  # it does not end before
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    reply = said(client, temperature=0, logprobs=True, top_logprobs=3)
    assert texts(reply) == [tokenizer.decode(ids[0, start:], skip_special_tokens=True)]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (start, 24)
    assert reply.choices[0].finish_reason == "length"
    logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)
    content = reply.choices[0].logprobs.content
    assert "".join(token.token for token in content) == texts(reply)[0]
    for at, token in enumerate(content, start):
        top, _ = logprobs[at - 1].topk(3)
        assert token.logprob == pytest.approx(float(logprobs[at - 1, ids[0, at]]), abs=1e-4)
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(top.tolist(), abs=1e-4)
        assert bytes(token.bytes).decode() == token.token


def test_a_stream_says_what_the_reply_says(client: openai.OpenAI) -> None:
    whole = said(client, n=3, seed=5)
    chunks = list(said(client, n=3, seed=5, stream=True, stream_options={"include_usage": True}))
    assert streamed(chunks) == dict(enumerate(texts(whole)))
    assert len(set(texts(whole))) == 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    ends = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(ends) == sorted(choice.finish_reason for choice in whole.choices)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_stream_is_as_openai_writes_it(url: str) -> None:
    body = {"model": "fork-tiny", "messages": ASKED, "max_tokens": 2, "stream": True}
    reply = httpx.post(f"{url}/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "usage" not in first


def test_a_seed_decides_whoever_else_is_served(client: openai.OpenAI) -> None:
    alone = [texts(said(client, seed=seed)) for seed in range(6)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda i: texts(said(client, seed=i % 6, max_tokens=24)), range(12)))
    assert together == alone * 2
    assert len({text for (text,) in alone}) == 6
    assert texts(said(client)) != texts(said(client))


def test_a_model_that_many_ask_first_at_once_computes_as_ever(tmp_path: Path, client: openai.OpenAI) -> None:
    """transformers changes torch's default dtype while it builds a model: two threads that do may leave it so."""
    expected = texts(said(client, temperature=0, max_tokens=4))
    for attempt in range(3):
        with serving(settings_in(tmp_path / str(attempt))) as url, ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(said, client_of(url), temperature=0, max_tokens=4) for _ in range(24)]
            assert [texts(one.result()) for one in asked] == [expected] * 24
        assert torch.get_default_dtype() == torch.float32


def test_an_answer_is_longer_than_a_slice(client: openai.OpenAI) -> None:
    long = said(client, max_tokens=150, temperature=0, logit_bias=ENDLESS)
    short = said(client, max_tokens=40, temperature=0, logit_bias=ENDLESS)
    assert long.usage.completion_tokens == 150
    assert texts(long)[0].startswith(texts(short)[0])


def test_nobody_waits_for_the_longest_answer(tmp_path: Path) -> None:
    """Neither its neighbours, nor those who ask a model that is not in memory yet."""
    catalogue = Catalogue(models={"fork-tiny": ModelSection(), "other": ModelSection()})
    settings = settings_in(tmp_path / "data", catalogue=catalogue)
    with serving(settings) as url, ThreadPoolExecutor(1) as pool:
        client = client_of(url)
        stream = said(client, max_tokens=480, temperature=0, logit_bias=ENDLESS, stream=True)
        next(stream)
        long = pool.submit(list, stream)
        for model in ("fork-tiny", "other"):
            assert said(client, model=model, max_tokens=2).usage.completion_tokens == 2
        assert not long.done()
        assert len(long.result()) > 400


def test_stop_strings_end_an_answer_and_are_not_part_of_it(client: openai.OpenAI) -> None:
    whole = texts(said(client, temperature=0))[0]
    stop = whole[12:17]
    chunks = said(client, temperature=0, stop=[stop, "never said"], stream=True, logprobs=True)
    told = list(chunks)
    assert streamed(told)[0] == whole[: whole.index(stop)]
    assert told[-1].choices[0].finish_reason == "stop"
    shown = "".join(t.token for c in told for ch in c.choices if ch.logprobs for t in ch.logprobs.content)
    assert stop not in shown


def test_no_half_character_and_no_half_stop_string_is_told() -> None:
    """With a vocabulary of bytes, as the last resort of every byte-level tokenizer."""

    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode(errors="replace")

    told: list[Piece] = []
    row = Row([1], Sampling(longest=50, seed=0, temperature=0, stop=("END",)), Bytes(), [0], told.append)
    for byte in "é ENé END no".encode():
        if not row.done:
            row.choose(torch.nn.functional.one_hot(torch.tensor(byte), 256).float())
    assert "".join(piece.text for piece in told) == "é ENé "
    assert [piece.text for piece in told] == ["é", " ", "ENé", " ", ""]
    assert told[-1].finish == "stop"


def test_sampling_follows_its_options() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))

    def drawn(**options: Any) -> list[float]:
        row = Row([0], Sampling(longest=10**6, seed=1, **options), None, [], lambda piece: None)
        row.generated = [1]
        counts = [0] * 4
        for _ in range(4000):
            counts[row._draw(logits)] += 1
        return [count / 4000 for count in counts]

    assert drawn() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert drawn(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert drawn(top_p=0.0) == [1, 0, 0, 0]
    assert drawn(temperature=0.0) == [1, 0, 0, 0]
    cold = [p**2 for p in (0.5, 0.3, 0.15, 0.05)]
    assert drawn(temperature=0.5) == pytest.approx([p / sum(cold) for p in cold], abs=0.03)
    assert drawn(bias={3: 100.0}) == [0, 0, 0, 1]
    lower = [0.5, 0.3 * math.exp(-1.5), 0.15, 0.05]
    found = drawn(frequency_penalty=1.0, presence_penalty=0.5)
    assert found == pytest.approx([p / sum(lower) for p in lower], abs=0.03)


def test_what_cannot_be_held_is_refused(client: openai.OpenAI) -> None:
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "temperature": ({"temperature": 2.5}, "above maximum"),
        "top_logprobs": ({"top_logprobs": 2}, "only allowed when 'logprobs'"),
        "response_format": ({"response_format": {"type": "json_object"}}, "must be {'type': 'text'}"),
        "logit_bias": ({"logit_bias": {"the": 3}}, "ids of this model's tokens"),
        "messages": ({"messages": [{"role": "user", "content": "far " * 600}]}, "maximum context length is 512"),
        "n": ({"n": 129}, "above maximum"),
        "stop": ({"stop": ["a"] * 5}, "at most 4"),
    }
    for param, (options, words) in wrong.items():
        with pytest.raises(openai.BadRequestError, match=words) as refused:
            said(client, **options)
        assert refused.value.param == param
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="a part that is not text"):
        said(client, messages=image)
    with pytest.raises(openai.BadRequestError, match=r"chat\.completions"):
        client.responses.create(model="fork-tiny", input="hello")


WRONG_SHAPES: dict[str, dict[str, Any]] = {
    "messages[0].role": {"messages": [{"role": "bot", "content": "x"}]},
    "messages[1].content": {"messages": [*ASKED, {"role": "user", "content": 3}]},
    "messages[0].name": {"messages": [{"role": "user", "content": "x", "name": 3}]},
    "messages[0].tool_call_id": {"messages": [{"role": "tool", "content": "x"}]},
    "messages[0].tool_calls[0].id": {
        "messages": [
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
        ]
    },
    "tools[0].function.name": {"tools": [{"type": "function", "function": {}}]},
    "tools[0].type": {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
    "functions[0].parameters": {"functions": [{"name": "f", "parameters": "x"}]},
    "logit_bias.3": {"logit_bias": {"3": 0.5}},
    "stop": {"stop": []},
    "store": {"store": "yes"},
    "stream": {"stream": "yes"},
    "stream_options.include_usage": {"stream": True, "stream_options": {"include_usage": 1}},
    "metadata.k": {"metadata": {"k": 1}},
    "reasoning_effort": {"reasoning_effort": "much"},
    "safety_identifier": {"safety_identifier": "x" * 65},
    "audio.format": {"audio": {"voice": "alloy", "format": "midi"}},
}


@pytest.mark.parametrize("param", WRONG_SHAPES)
def test_what_the_specification_forbids_is_refused_by_its_place(client: openai.OpenAI, param: str) -> None:
    """Also where it would change nothing."""
    body = {"model": "fork-tiny", "messages": ASKED, "max_tokens": 1, **WRONG_SHAPES[param]}
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions", body=body, cast_to=object)
    assert refused.value.param == param


def test_messages_of_every_role_are_read(client: openai.OpenAI) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": "What time is it?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12:00", "tool_call_id": "c"},
        {"role": "assistant", "content": "Noon.", "refusal": None},
        *ASKED,
    ]
    reply = said(client, messages=messages, tools=[tool], tool_choice="auto", temperature=0)
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.prompt_tokens > said(client, messages=messages[1:2]).usage.prompt_tokens


def test_what_is_ignored_is_named(client: openai.OpenAI) -> None:
    reply = said(client, max_tokens=0, store=True, reasoning_effort="low", user="u")
    assert reply.model_extra["tunefork"] == {"base": "fork-tiny", "ignored": ["reasoning_effort", "store", "user"]}
    assert texts(reply) == [""]
    assert reply.choices[0].finish_reason == "length"


def test_more_than_may_wait_is_refused_and_nothing_hangs(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="overloaded"):
        said(client, n=41)
    assert len(texts(said(client, n=40, max_tokens=2))) == 40


def test_text_goes_on_and_is_measured(client: openai.OpenAI) -> None:
    prompts = ["Once upon a time", "The king of the"]
    found = client.completions.create(model="fork-tiny", prompt=prompts, max_tokens=5, temperature=0, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text != found.choices[2].text
    measured = client.completions.create(model="fork-tiny", prompt=prompts[0], max_tokens=0, echo=True, logprobs=1)
    (choice,) = measured.choices
    assert choice.text == prompts[0]
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == prompts[0]  # and not the token that begins every text
    assert all(value < 0 for value in choice.logprobs.token_logprobs)
    chunks = client.completions.create(model="fork-tiny", prompt=prompts[0], max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == found.choices[0].text


def test_who_goes_away_is_not_answered_any_longer(url: str, client: openai.OpenAI) -> None:
    place = urlsplit(url)
    body = json.dumps({"model": "fork-tiny", "messages": ASKED, "n": 40, "logit_bias": {"2": -100}}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    refused = openai.InternalServerError  # the queue is full until the connections are gone

    def occupied() -> bool:
        """A long request that comes while a short one is answered is refused itself, so it is made again."""
        connection = stack.enter_context(socket.create_connection((place.hostname or "", place.port or 0)))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return _refused(client, refused)

    with ExitStack() as stack:
        wait_for(occupied)
    wait_for(lambda: not _refused(client, refused))


def _refused(client: openai.OpenAI, kind: type[Exception]) -> bool:
    try:
        said(client, max_tokens=1, n=40)
    except kind:
        return True
    return False
