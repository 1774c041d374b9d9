"""Several answers at once: gathered into one reply, or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import StreamingResponse

from tunefork import __version__
from tunefork.server.inference.engine import Engine, Voice
from tunefork.server.inference.rows import Piece, Row, Sampling, Token
from tunefork.server.problems import ApiError
from tunefork.server.store import new_id, now


@dataclass
class Answer:
    """One that has ended."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str = "length"


class Answers:
    """The answers of one request, made on the event loop that reads them."""

    def __init__(self, voice: Voice, task: str) -> None:
        self.voice, self.renderer = voice, voice.renderer(task)
        self.rows: list[Row] = []
        self.prompt_tokens = 0
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def add(
        self,
        prompt: tuple[int, ...],
        samplings: Iterable[Sampling],
        *,
        read_prompt: bool = False,
        special: bool = False,
    ) -> None:
        """Answers to one prompt, at least one."""
        self.prompt_tokens += len(prompt)
        for sampling in samplings:
            tell = self._listener(len(self.rows))
            row = Row(prompt, sampling, self.voice.tokenizer, (), tell, read_prompt=read_prompt, special=special)
            self.rows.append(row)

    def start(self, engine: Engine) -> None:
        """Raises ApiError where the server is overloaded."""
        engine.submit([row for row in self.rows if row.left or row.read_prompt], self.voice, self.renderer)
        for row in self.rows:
            if not row.left and not row.read_prompt:
                row.tell(Piece(finish="length"))

    def stop(self) -> None:
        for row in self.rows:
            row.stop()

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far; the token that ends an answer is one."""
        made = sum(len(row.generated) for row in self.rows)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Every piece with the number of its answer, until all have ended. Raises what made an answer fail."""
        open_ = len(self.rows)
        while open_:
            number, piece = await self._pieces.get()
            if piece.error is not None:
                raise piece.error
            open_ -= piece.finish is not None
            yield number, piece

    async def gathered(self, request: Request) -> list[Answer]:
        """All of them. Stops them where the client goes away."""
        found = [Answer() for _ in self.rows]
        gone = asyncio.ensure_future(self._end_with(request))
        try:
            async for number, piece in self.pieces():
                found[number].text += piece.text
                found[number].tokens += piece.tokens
                found[number].finish = piece.finish or found[number].finish
        finally:
            gone.cancel()
            self.stop()
        return found

    async def streamed(
        self, chunks: Callable[[int, Piece], Iterable[dict[str, Any]]], last: Callable[[], Iterable[dict[str, Any]]]
    ) -> StreamingResponse:
        """Server-sent events: the chunks of every piece, then the `last` ones. The status waits for the first piece."""
        pieces = self.pieces()
        try:
            first = await anext(pieces)
        except BaseException:
            self.stop()
            raise

        async def events() -> AsyncIterator[str]:
            try:
                for chunk in chunks(*first):
                    yield _event(chunk)
                async for number, piece in pieces:
                    for chunk in chunks(number, piece):
                        yield _event(chunk)
                for chunk in last():
                    yield _event(chunk)
                yield "data: [DONE]\n\n"
            finally:
                self.stop()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _end_with(self, request: Request) -> None:
        """Waits for the client to go away."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._pieces.put_nowait((0, Piece(error=ApiError("The client went away.", status=499))))

    def _listener(self, number: int) -> Callable[[Piece], None]:
        def tell(piece: Piece) -> None:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))

        return tell


def head(kind: str, prefix: str, voice: Voice, ignored: Sequence[str]) -> dict[str, Any]:
    """What every reply, or chunk, begins with. Our own words stand under `tunefork`."""
    made = f"{__version__} {torch.__version__} {voice.facts.fingerprint}"
    return {
        "id": new_id(prefix, 29),
        "object": kind,
        "created": now(),
        "model": voice.served.name,
        "system_fingerprint": f"fp_{hashlib.sha256(made.encode()).hexdigest()[:10]}",
        "tunefork": {"base": voice.served.base, "ignored": list(ignored)},
    }


def room_for(voice: Voice, prompt: tuple[int, ...], param: str) -> int:
    """Tokens that an answer may have. Raises ApiError for a prompt that leaves room for none."""
    room = voice.positions - len(prompt)
    if room < 1:
        message = (
            f"This model's maximum context length is {voice.positions} tokens. However, your {param} resulted in "
            f"{len(prompt)} tokens. Please reduce the length of the {param}."
        )
        raise ApiError(message, param=param, code="context_length_exceeded")
    return room


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
