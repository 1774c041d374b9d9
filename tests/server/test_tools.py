"""Tool calls: read out of what models write, and taught to the embedded model, which then makes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.clients.promise import HELD_OUT, THINGS, asked
from tests.server.scenes import client_of, serving, settings_in, wait_for
from tests.tiny import tiny_model
from tunefork.models import inspect_model, load_tokenizer
from tunefork.recipe import ModelSection
from tunefork.server import Catalogue
from tunefork.server.inference.calls import Call, CallReader

LOOK: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
WAIT: Any = {"type": "function", "function": {"name": "wait", "parameters": {"type": "object"}}}
ONE = '{"name": "look", "arguments": {"at": "café"}}'
TWO = '{"name": "wait", "arguments": {}}'
READ = Call("look", '{"at": "café"}')
WAITED = Call("wait", "{}")


def tokenizer() -> Any:
    return load_tokenizer(inspect_model(ModelSection()))


def read(text: str, pieces: int, tokenizer: Any) -> tuple[list[str], list[Call]]:
    """The text that is told while it comes, in so many characters at once, and at the end; and the calls."""
    reader = CallReader(tokenizer, [], [LOOK, WAIT])
    told = [reader.feed(text[at : at + pieces]) for at in range(0, len(text), pieces)]
    rest, calls = reader.close()
    return ["".join(told), rest], calls


FORMS: dict[str, tuple[str, str, list[Call]]] = {
    "hermes": (f"<tool_call>\n{ONE}\n</tool_call>", "", [READ]),
    "two, after words": (
        f"I see.\n\n<tool_call>{ONE}</tool_call>\n<tool_call>{TWO}</tool_call>\n",
        "I see.",
        [READ, WAITED],
    ),
    "llama": ('{"name": "look", "parameters": {"at": "café"}}', "", [READ]),
    "llama, after its tag": (f"<|python_tag|>{ONE}; {TWO}", "", [READ, WAITED]),
    "mistral": (f"[TOOL_CALLS] [{ONE}, {TWO}]", "", [READ, WAITED]),
    "mistral, newer": ('Now.[TOOL_CALLS]look[ARGS]{"at": "café"}[TOOL_CALLS]wait{}', "Now.", [READ, WAITED]),
    "arguments as text": ('{"name": "look", "arguments": "{\\"at\\": \\"café\\"}"}', "", [READ]),
}


@pytest.mark.parametrize("pieces", [1, 7, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_read_in_every_form(form: str, pieces: int) -> None:
    text, told, calls = FORMS[form]
    assert read(text, pieces, tokenizer()) == ([told, ""], calls)


def test_special_tokens_are_seen_and_not_told() -> None:
    reader = CallReader(tokenizer(), [], [WAIT])
    told = [reader.feed(token) for token in ("So ", "<|user|>", "it is.", "<tool_call>", TWO)]
    assert told == ["So", " ", "it is.", "", ""]
    assert reader.close() == ("", [WAITED])


@pytest.mark.parametrize("pieces", [1, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "It is < 3 and [TOOL",
        '{"name": "Ann", "age": 7}',
        '[1, 2, {"a": ',
        '<tool_call>{"name": "fly", "arguments": {}}</tool_call>',  # was not offered
        '<tool_call>{"name": "look", "arguments": {"at": </tool_call>',
        f"<tool_call>{ONE}</tool_call> and so on",
        "Write <tool_call> to call.",
        "  ",
    ],
)
def test_what_is_no_call_stays_text(text: str, pieces: int) -> None:
    told, calls = read(text, pieces, tokenizer())
    assert ("".join(told), calls) == (text, [])


def test_a_tokenizer_that_says_how_replies_are_written_is_asked() -> None:
    """In a form that nobody else writes, through transformers; arguments have the types of the tool's schema."""
    known = tokenizer()
    known.response_template = {
        "start_anchor": "<|assistant|>\n",
        "defaults": {"role": "assistant"},
        "fields": {
            "content": {"content": "text"},
            "tool_calls": {
                "open_pattern": r"@(?P<name>\w+)\(",
                "close": ")",
                "repeats": True,
                "content": "kv-lines",
                "content_args": {"line_sep": ",", "kv_sep": "="},
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
        },
    }
    assert read("So. @look(at=sea)@wait()", 3, known) == (["", "So."], [Call("look", '{"at": "sea"}'), WAITED])
    assert read("So. @fly(at=sea)", 3, known) == (["", "So. @fly(at=sea)"], [])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    blind = ModelSection(name=str(tiny_model("llama", tmp_path_factory.mktemp("blind"))))
    catalogue = Catalogue(models={"fork-tiny": ModelSection(), "blind": blind})
    with serving(settings_in(tmp_path_factory.mktemp("data"), slots=1, catalogue=catalogue)) as url:
        yield client_of(url)


def called(arguments: str) -> dict[str, Any]:
    function = {"name": "look", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}


@pytest.fixture(scope="module")
def tuned(client: openai.OpenAI) -> str:
    """A model that was taught to look before it answers, where it may look."""
    rows = [
        {
            "messages": [
                asked(thing),
                called('{"at": "colour"}'),
                {"role": "tool", "tool_call_id": "call_1", "content": "teal"},
                {"role": "assistant", "content": "It is teal."},
            ],
            "tools": [LOOK],
        }
        for thing in THINGS
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("calls.jsonl", content), purpose="fine-tune")
    chosen: Any = {"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 4}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": chosen}}
    id = client.fine_tuning.jobs.create(model="fork-tiny", training_file=file.id, seed=7, method=method).id

    def done() -> Any:
        job = client.fine_tuning.jobs.retrieve(id)
        return job if job.status in ("succeeded", "failed") else None

    job = wait_for(done)
    assert job.status == "succeeded", job.error
    return job.fine_tuned_model


def ask(client: openai.OpenAI, model: str, messages: list[Any], **options: Any) -> Any:
    made = {"model": model, "messages": messages, "tools": [LOOK], "temperature": 0, "max_tokens": 60}
    return client.chat.completions.create(**{**made, **options})


@pytest.mark.parametrize("thing", HELD_OUT)
def test_a_call_that_was_taught_is_made_and_its_result_is_used(client: openai.OpenAI, tuned: str, thing: str) -> None:
    (choice,) = ask(client, tuned, [asked(thing)], logprobs=True).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_") and call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": "colour"})
    result = {"role": "tool", "tool_call_id": call.id, "content": "teal"}
    (choice,) = ask(client, tuned, [asked(thing), choice.message, result]).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", "It is teal.")
    assert choice.message.tool_calls is None


def test_a_streamed_call_is_as_openai_writes_it(client: openai.OpenAI, tuned: str) -> None:
    chunks = list(ask(client, tuned, [asked(HELD_OUT[0])], stream=True, n=2))
    for number in range(2):
        found = [choice for chunk in chunks for choice in chunk.choices if choice.index == number]
        assert (found[0].delta.role, found[0].delta.content) == ("assistant", None)
        assert not any(choice.delta.content for choice in found)
        first, second = [choice.delta.tool_calls[0] for choice in found if choice.delta.tool_calls]
        assert (first.index, first.type, first.function.name, first.function.arguments) == (0, "function", "look", "")
        assert first.id.startswith("call_") and second.id is None and second.function.name is None
        assert json.loads(second.function.arguments) == {"at": "colour"}
        assert [choice.finish_reason for choice in found if choice.finish_reason] == ["tool_calls"]


def test_the_client_puts_a_streamed_call_together(client: openai.OpenAI, tuned: str) -> None:
    with client.chat.completions.stream(
        model=tuned, messages=[asked(HELD_OUT[1])], tools=[LOOK], temperature=0, max_tokens=60  # type: ignore[list-item]
    ) as stream:  # fmt: skip
        message = stream.get_final_completion().choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == {"at": "colour"}


def test_the_older_form_gets_its_own_kind_of_reply(client: openai.OpenAI, tuned: str) -> None:
    options: Any = {"tools": None, "functions": [LOOK["function"]]}
    (choice,) = ask(client, tuned, [asked(HELD_OUT[0])], **options).choices
    assert choice.finish_reason == "function_call"
    assert choice.message.tool_calls is None
    assert (choice.message.function_call.name, choice.message.function_call.arguments) == ("look", '{"at": "colour"}')
    chunks = list(ask(client, tuned, [asked(HELD_OUT[0])], stream=True, **options))
    deltas = [choice.delta.function_call for chunk in chunks for choice in chunk.choices if choice.delta.function_call]
    assert [delta.name for delta in deltas] == ["look", None]
    assert "".join(delta.arguments for delta in deltas) == '{"at": "colour"}'


def test_without_tools_nothing_is_read_as_a_call(client: openai.OpenAI, tuned: str) -> None:
    for options in ({"tools": None}, {"tool_choice": "none"}):
        (choice,) = ask(client, tuned, [asked(HELD_OUT[0])], **options).choices
        assert choice.finish_reason in ("stop", "length")
        assert choice.message.tool_calls is None


def test_a_call_that_must_be_made_is_begun_for_the_model(client: openai.OpenAI, tuned: str) -> None:
    """To a question that was not taught."""
    hello: Any = [{"role": "user", "content": "Hello, who are you?"}]
    named = {"type": "function", "function": {"name": "look"}}
    for options in (
        {"tool_choice": "required"},
        {"tool_choice": "required", "tools": [LOOK, WAIT]},
        {"tool_choice": named, "tools": [WAIT, LOOK]},
    ):
        (choice,) = ask(client, tuned, hello, **options).choices
        assert choice.finish_reason == "tool_calls", options
        assert [call.function.name for call in choice.message.tool_calls] == ["look"], options
        json.loads(choice.message.tool_calls[0].function.arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"tool_choice": "required", "tools": None},
        {"tool_choice": {"type": "function", "function": {"name": "fly"}}},
        {"tool_choice": {"type": "custom", "custom": {"name": "look"}}},
        {"function_call": {"name": "fly"}},
    ],
)
def test_a_tool_that_is_not_offered_cannot_be_forced(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="a function that is offered"):
        ask(client, "fork-tiny", [asked("sea")], **options)


def test_it_is_said_where_a_template_does_not_show_tools(client: openai.OpenAI) -> None:
    for model, ignored in (("blind", ["tools"]), ("fork-tiny", [])):
        reply = ask(client, model, [asked("sea")], max_tokens=1)
        assert reply.model_extra["tunefork"]["ignored"] == ignored
    with pytest.raises(openai.BadRequestError, match="writes no tool calls"):
        ask(client, "blind", [asked("sea")], tool_choice="required")
