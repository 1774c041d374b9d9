"""/v1/chat/completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Security
from fastapi.concurrency import run_in_threadpool

from tunefork.data import Row
from tunefork.data.chats import conversation
from tunefork.data.findings import Problem, Tally
from tunefork.errors import DataError, RecipeError, UnsupportedError
from tunefork.render import Renderer
from tunefork.server.auth import Caller, allowed
from tunefork.server.inference.answers import Answers, head, room_for
from tunefork.server.inference.engine import Voice
from tunefork.server.inference.requests import ChatAsked
from tunefork.server.inference.rows import Piece, Token
from tunefork.server.models import Served, resolve_model
from tunefork.server.problems import ApiError
from tunefork.server.state import Server, server_of

router = APIRouter(prefix="/v1/chat/completions")
Asker = Annotated[Caller, Security(allowed, scopes=["model.request"])]
ServerOf = Annotated[Server, Depends(server_of)]


@router.post("")
async def create_chat_completion(body: ChatAsked, request: Request, caller: Asker, server: ServerOf) -> Any:
    body.check()
    voice = await voice_of(server, body.model, caller)
    prompt = await run_in_threadpool(_prompt, voice, body)
    room = room_for(voice, prompt, "messages")
    answers = Answers(voice, "chat")
    answers.add(prompt, body.samplings(room, len(voice.tokenizer), body.limit, body.top))
    answers.start(server.engine)
    if body.stream:
        start = head("chat.completion.chunk", "chatcmpl-", voice, body.ignored)
        usage = {"usage": None} if body.with_usage else {}
        begun: set[int] = set()

        def chunks(number: int, piece: Piece) -> Iterable[dict[str, Any]]:
            parts: list[tuple[dict[str, Any], Piece, str | None]] = []
            if number not in begun:
                begun.add(number)
                parts.append(({"role": "assistant", "content": "", "refusal": None}, Piece(), None))
            if piece.text or piece.tokens:
                parts.append(({"content": piece.text}, piece, None))
            if piece.finish:
                parts.append(({}, Piece(), piece.finish))
            for delta, told, finish in parts:
                choice = {
                    "index": number,
                    "delta": delta,
                    "logprobs": _logprobs(told.tokens) if told.tokens else None,
                    "finish_reason": finish,
                }
                yield {**start, "choices": [choice], **usage}

        def last() -> Iterable[dict[str, Any]]:
            return [{**start, "choices": [], "usage": answers.usage}] if body.with_usage else []

        return await answers.streamed(chunks, last)
    choices = [
        {
            "index": number,
            "message": {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []},
            "logprobs": None if body.top is None else _logprobs(answer.tokens),
            "finish_reason": answer.finish,
        }
        for number, answer in enumerate(await answers.gathered(request))
    ]
    start = head("chat.completion", "chatcmpl-", voice, body.ignored)
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


def _prompt(voice: Voice, body: ChatAsked) -> tuple[int, ...]:
    """Ids of the conversation with the next reply opened, by the path that training rows take. Raises ApiError."""
    row = Row({"messages": body.messages, "tools": body.offered}, "request", 1)
    renderer = renderer_of(voice, "chat")
    try:
        values = conversation(row, Tally(), Counter(), sharegpt=False, answers=False)
        if isinstance(values, Problem):
            raise ApiError(f"Invalid 'messages': {values.what}.", param="messages", code="invalid_value")
        reply = {"role": "assistant", "content": ""}  # the one that is asked for: the renderer leaves it out
        example = renderer.task.example(Row({**values, "messages": [*values["messages"], reply]}, "request", 1))
        return renderer.prompt(example).ids
    except DataError as error:
        message = f"Invalid 'messages': {str(error).removeprefix('request:1: ')}"
        raise ApiError(message, param="messages", code="invalid_value") from None


def _logprobs(tokens: Iterable[Token]) -> dict[str, Any]:
    content = [{**_told(token), "top_logprobs": [_told(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _told(token: Token) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.text.encode()) if token.whole else None,
    }
