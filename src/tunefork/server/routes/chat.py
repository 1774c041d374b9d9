"""/v1/chat/completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Security
from fastapi.concurrency import run_in_threadpool

from tunefork.data import Row
from tunefork.data.chats import conversation
from tunefork.data.findings import Problem, Tally
from tunefork.errors import DataError, RecipeError, UnsupportedError
from tunefork.render import Renderer
from tunefork.render.chat import ChatText, chat_texts
from tunefork.server.auth import Caller, allowed
from tunefork.server.inference.answers import Answers, head, room_for
from tunefork.server.inference.calls import Call, CallReader
from tunefork.server.inference.engine import Voice
from tunefork.server.inference.requests import ChatAsked
from tunefork.server.inference.rows import Piece, Token
from tunefork.server.models import Served, resolve_model
from tunefork.server.problems import ApiError
from tunefork.server.state import Server, server_of
from tunefork.server.store import new_id

router = APIRouter(prefix="/v1/chat/completions")
Asker = Annotated[Caller, Security(allowed, scopes=["model.request"])]
ServerOf = Annotated[Server, Depends(server_of)]
_ANY = "any_tool"  # stands for a name that the model is to choose


@router.post("")
async def create_chat_completion(body: ChatAsked, request: Request, caller: Asker, server: ServerOf) -> Any:
    body.check()
    voice = await voice_of(server, body.model, caller)
    prompt, opening, unseen = await run_in_threadpool(_prompt, voice, body)
    begun = tuple(voice.tokenizer(opening, add_special_tokens=False)["input_ids"]) if opening else ()
    room = room_for(voice, prompt + begun, "messages")
    answers = Answers(voice, "chat")
    samplings = body.samplings(room, len(voice.tokenizer), body.limit, body.top)
    answers.add(prompt + begun, samplings, special=bool(body.offered))
    readers = [CallReader(voice.tokenizer, prompt, body.offered) for _ in samplings]
    for reader in readers:
        reader.feed(opening)
    answers.start(server.engine)
    ignored = sorted([*body.ignored, *unseen])

    def told(number: int, text: str, finish: str | None) -> tuple[str, dict[str, Any], str | None]:
        """Of a reply's new text what can be told; with the last, its calls and why it ended."""
        if not body.offered:
            return text, {}, finish
        text = readers[number].feed(text)
        if finish is None:
            return text, {}, None
        rest, calls = readers[number].close()
        if not calls:
            return text + rest, {}, finish
        shown = _shown(calls, body)
        ended = "tool_calls" if body.tools else "function_call"
        return text + rest, shown, ended if finish == "stop" else finish

    if body.stream:
        start = head("chat.completion.chunk", "chatcmpl-", voice, ignored)
        usage = {"usage": None} if body.with_usage else {}
        spoken: set[int] = set()

        def chunks(number: int, piece: Piece) -> Iterable[dict[str, Any]]:
            parts: list[tuple[dict[str, Any], Piece, str | None]] = []
            text, calls, finish = told(number, piece.text, piece.finish)
            if number not in spoken and (text or piece.tokens or finish):
                spoken.add(number)
                content = None if calls and not text else ""
                parts.append(({"role": "assistant", "content": content, "refusal": None}, Piece(), None))
            if text or piece.tokens:
                parts.append(({"content": text}, piece, None))
            parts += [(delta, Piece(), None) for delta in _deltas(calls)]
            if finish:
                parts.append(({}, Piece(), finish))
            for delta, measured, ended in parts:
                choice = {
                    "index": number,
                    "delta": delta,
                    "logprobs": _logprobs(measured.tokens) if measured.tokens else None,
                    "finish_reason": ended,
                }
                yield {**start, "choices": [choice], **usage}

        def last() -> Iterable[dict[str, Any]]:
            return [{**start, "choices": [], "usage": answers.usage}] if body.with_usage else []

        return await answers.streamed(chunks, last)
    choices = []
    for number, answer in enumerate(await answers.gathered(request)):
        text, calls, finish = told(number, answer.text, answer.finish)
        content = None if calls and not text else text
        message = {"role": "assistant", "content": content, "refusal": None, "annotations": [], **calls}
        logprobs = None if body.top is None else _logprobs(answer.tokens)
        choices.append({"index": number, "message": message, "logprobs": logprobs, "finish_reason": finish})
    start = head("chat.completion", "chatcmpl-", voice, ignored)
    return {**start, "choices": choices, "usage": answers.usage}


async def voice_of(server: Server, model: str, caller: Caller) -> Voice:
    """How the model of this name is asked. Raises ApiError (404) where there is none for the caller."""
    return await server.engine.voice(await run_in_threadpool(_served, server, model, caller))


def _served(server: Server, model: str, caller: Caller) -> Served:
    with server.store.read() as db:
        return resolve_model(db, server.settings, model, caller.project_id)


def renderer_of(voice: Voice, task: str) -> Renderer:
    """Raises ApiError where the model cannot be asked in this way."""
    try:
        return voice.renderer(task)
    except (RecipeError, UnsupportedError) as error:
        raise ApiError(str(error), param="model", code="model_not_supported") from None


def _prompt(voice: Voice, body: ChatAsked) -> tuple[tuple[int, ...], str, list[str]]:
    """Ids of the conversation with the next reply opened, by the path that training rows take; how that reply begins,
    where it must call a tool; and what the model's template does not show. Raises ApiError."""
    row = Row({"messages": body.messages, "tools": body.offered}, "request", 1)
    renderer, forced, opening = renderer_of(voice, "chat"), body.forced, ""
    reply: dict[str, Any] = {"role": "assistant", "content": ""}  # what is asked for: the renderer leaves it out
    if forced is not None:
        function = {"name": forced or _ANY, "arguments": {}}
        reply["tool_calls"] = [{"id": new_id("", 9), "type": "function", "function": function}]
    try:
        values = conversation(row, Tally(), Counter(), sharegpt=False, answers=False)
        if isinstance(values, Problem):
            raise ApiError(f"Invalid 'messages': {values.what}.", param="messages", code="invalid_value")
        messages = [*({**message, "weight": 0} for message in values["messages"]), reply]
        example = renderer.task.example(Row({**values, "messages": messages}, "request", 1))
        ids = renderer.prompt(example).ids
        blind = bool(body.offered) and renderer.prompt(replace(example, tools=())).ids == ids
        if forced is not None:
            opening = _opening(chat_texts(voice.tokenizer, example)[-1], forced)
    except DataError as error:
        message = f"Invalid 'messages': {str(error).removeprefix('request:1: ')}"
        raise ApiError(message, param="messages", code="invalid_value") from None
    return ids, opening, [name for name in ("functions", "tools") if blind and getattr(body, name)]


def _opening(written: ChatText, name: str) -> str:
    """How the template begins a call: of this tool up to its arguments, or of any tool. Raises ApiError."""
    ((begin, end),) = written.trained
    reply = written.text[begin:end]
    at = reply.find(name or _ANY)
    until = reply.find("{}", at) if name else at
    if at < 0 or until < 0 or "{}" in reply[:at]:
        message = "This model's chat template writes no tool calls, or their arguments first: none can be forced."
        raise ApiError(message, param="tool_choice", code="unsupported_value")
    return reply[:until].rstrip()


def _shown(calls: Sequence[Call], body: ChatAsked) -> dict[str, Any]:
    """What a message has for them: `tool_calls`, or `function_call` for a request in that older form."""
    functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
    if not body.tools:
        return {"function_call": functions[0]}
    if body.parallel_tool_calls is False:
        functions = functions[:1]
    return {"tool_calls": [{"id": new_id("call_"), "type": "function", "function": function} for function in functions]}


def _deltas(calls: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Of each call first the name, then the arguments."""
    if "function_call" in calls:
        yield {"function_call": {**calls["function_call"], "arguments": ""}}
        yield {"function_call": {"arguments": calls["function_call"]["arguments"]}}
    for index, call in enumerate(calls.get("tool_calls", ())):
        yield {"tool_calls": [{"index": index, **call, "function": {**call["function"], "arguments": ""}}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": call["function"]["arguments"]}}]}


def _logprobs(tokens: Iterable[Token]) -> dict[str, Any]:
    content = [{**_told(token), "top_logprobs": [_told(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _told(token: Token) -> dict[str, Any]:
    whole = list(token.text.encode()) if token.whole else None
    return {"token": token.text, "logprob": token.logprob, "bytes": whole}
