"""/v1/completions: text that goes on. Models trained on prompts and completions are asked here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Security
from fastapi.concurrency import run_in_threadpool

from tunefork.server.auth import Caller, allowed
from tunefork.server.inference.answers import Answers, head, room_for
from tunefork.server.inference.engine import Voice
from tunefork.server.inference.requests import TextAsked
from tunefork.server.inference.rows import Piece, Token
from tunefork.server.problems import ApiError
from tunefork.server.routes.chat import renderer_of, voice_of
from tunefork.server.state import Server, server_of
from tunefork.tasks import Example

router = APIRouter(prefix="/v1/completions")
Asker = Annotated[Caller, Security(allowed, scopes=["model.request"])]
ServerOf = Annotated[Server, Depends(server_of)]


@router.post("")
async def create_completion(body: TextAsked, request: Request, caller: Asker, server: ServerOf) -> Any:
    body.check()
    voice = await voice_of(server, body.model, caller)
    prompts = await run_in_threadpool(lambda: [_ids(voice, prompt) for prompt in body.prompts])
    answers = Answers(voice, "generation")
    read = bool(body.echo) and body.logprobs is not None
    for prompt in prompts:
        room = room_for(voice, prompt, "prompt")
        answers.add(
            prompt, body.samplings(room, len(voice.tokenizer), body.max_tokens, body.logprobs), read_prompt=read
        )
    answers.start(server.engine)
    texts = [voice.tokenizer.decode(prompt, skip_special_tokens=True) if body.echo else "" for prompt in prompts]
    echoes = [text for text in texts for _ in range(body.answers)]
    start = head("text_completion", "cmpl-", voice, body.ignored)
    if body.stream:
        offsets = [0] * len(echoes)
        usage = {"usage": None} if body.with_usage else {}

        def chunks(number: int, piece: Piece) -> Iterable[dict[str, Any]]:
            text, echoes[number] = echoes[number] + piece.text, ""
            logprobs = _logprobs(piece.tokens, offsets[number]) if body.logprobs is not None else None
            offsets[number] += sum(len(token.text) for token in piece.tokens)
            choice = {"text": text, "index": number, "logprobs": logprobs, "finish_reason": piece.finish}
            yield {**start, "choices": [choice], **usage}

        def last() -> Iterable[dict[str, Any]]:
            return [{**start, "choices": [], "usage": answers.usage}] if body.with_usage else []

        return await answers.streamed(chunks, last)
    choices = [
        {
            "text": echoes[number] + answer.text,
            "index": number,
            "logprobs": _logprobs(answer.tokens, 0) if body.logprobs is not None else None,
            "finish_reason": answer.finish,
        }
        for number, answer in enumerate(await answers.gathered(request))
    ]
    return {**start, "choices": choices, "usage": answers.usage}


def _ids(voice: Voice, prompt: str | list[int]) -> tuple[int, ...]:
    """Raises ApiError for ids that the model does not have, and for nothing to go on from."""
    if isinstance(prompt, list):
        if any(not 0 <= token < voice.facts.vocab for token in prompt):
            message = f"Invalid 'prompt': ids must be from 0 to {voice.facts.vocab - 1}."
            raise ApiError(message, param="prompt", code="invalid_value")
        ids = tuple(prompt)
    else:
        ids = renderer_of(voice, "generation").prompt(Example("request", prompt=prompt)).ids
    if not ids:
        raise ApiError("Invalid 'prompt': it must have a token at least.", param="prompt", code="invalid_value")
    return ids


def _logprobs(tokens: Iterable[Token], offset: int) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        found["tokens"].append(token.text)
        found["token_logprobs"].append(token.logprob)
        top = {other.text: other.logprob for other in token.top}
        found["top_logprobs"].append(top if token.logprob is not None else None)
        found["text_offset"].append(offset)
        offset += len(token.text)
    return found
