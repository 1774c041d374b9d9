"""Answers that were paid for: kept by what was asked, on disk before they are used, never asked for twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.errors import HostedError, Interrupted
from tunefork.files import FolderLock, append_line, make_folder, repair_lines, sync_file
from tunefork.hosted.client import Client
from tunefork.hosted.prices import Budget
from tunefork.train.interrupt import Interrupt

Body = Mapping[str, Any]
_OF_THE_REQUEST = (400, 413, 422)  # refusals that say nothing about other requests
_REFUSED_IN_A_ROW = 5  # so many, and no answer yet: it is not the requests


@dataclass(frozen=True, slots=True)
class Answer:
    """What a service said: its JSON as it came (without the bytes of tokens that their text tells), and when."""

    response: Mapping[str, Any]
    at: int  # seconds since 1970

    @property
    def text(self) -> str:
        return str(self._message.get("content") or "")

    @property
    def tool_calls(self) -> Sequence[Any]:
        return self._message.get("tool_calls") or ()

    @property
    def finish_reason(self) -> str | None:
        return self.response["choices"][0].get("finish_reason")

    @property
    def tokens(self) -> list[dict[str, Any]]:
        """Of the answer: token, logprob, top_logprobs. Empty where the service told none."""
        return list((self.response["choices"][0].get("logprobs") or {}).get("content") or ())

    @property
    def usage(self) -> Mapping[str, Any]:
        return self.response.get("usage") or {}

    @property
    def _message(self) -> Mapping[str, Any]:
        return self.response["choices"][0].get("message") or {}


class AnswerStore:
    """`answers.jsonl` of a folder: {"key", "at", "request", "response"}, one line an answer, only ever added to.

    A line is on the disk before its answer is used; a line that a kill cut short is taken away. One process at a time.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self.folder, self.path = folder, folder / "answers.jsonl"
        self._lock = FolderLock(folder)
        self._places: dict[str, int] = {}  # key -> where its line begins
        repair_lines(self.path)
        self._size = 0
        if self.path.exists():
            with self.path.open("rb") as file:
                for line in file:
                    self._places[json.loads(line)["key"]] = self._size
                    self._size += len(line)

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def get(self, key: str) -> Answer | None:
        if key not in self._places:
            return None
        with self.path.open("rb") as file:
            file.seek(self._places[key])
            line = json.loads(file.readline())
        return Answer(line["response"], line["at"])

    def put(self, key: str, request: Body, response: Mapping[str, Any]) -> None:
        append_line(
            self.path, {"key": key, "at": int(time.time()), "request": dict(request), "response": _slim(response)}
        )
        sync_file(self.path)
        self._places[key] = self._size
        self._size = self.path.stat().st_size

    def usage(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(model, usage) of every answer that is kept."""
        for key in list(self._places):
            answer = self.get(key)
            if answer is not None:
                yield str(answer.response.get("model", "")), answer.usage


def request_key(base_url: str, body: Body) -> str:
    """What stands for a request: the same for the same content sent to the same place, and only then."""
    return hashlib.sha256(json.dumps([base_url, body], sort_keys=True).encode()).hexdigest()


def ask_all(
    client: Client,
    store: AnswerStore,
    bodies: Sequence[Body],
    budget: Budget,
    *,
    concurrency: int = 8,
    on_answer: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer | HostedError]:
    """An answer a body, in order; those that `store` has cost nothing, equal bodies are asked once.

    A request that the service refuses for what it says has its HostedError in its place, and is not kept. What
    concerns all of them (key, model, limit, no connection) is raised, after the answers under way have been kept.
    `on_answer` hears (answered, of how many different ones).
    """
    keys = [request_key(client.service.base_url, body) for body in bodies]
    wanted = {key: body for key, body in zip(keys, bodies, strict=True) if store.get(key) is None}
    for body in wanted.values():
        budget.most(body)  # what has no bound is refused before anything is sent
    total, refused = len(set(keys)), dict[str, HostedError]()
    done = total - len(wanted)
    on_answer(done, total)

    def ask(body: Body) -> dict[str, Any]:
        with budget.reserved(body) as settle:
            response = client.chat(body, on_cut=lambda: settle({}, 1))
            settle(response.get("usage") or {}, 0)
            return response

    waiting = iter(wanted.items())
    running: dict[Future[dict[str, Any]], str] = {}
    failure: BaseException | None = None
    with Interrupt() as interrupt, ThreadPoolExecutor(concurrency) as pool:
        while True:
            alone = done == 0 and not refused  # the first one tells whether key and model are right
            room = (1 if alone else concurrency) - len(running) if failure is None else 0
            for key, body in (pair for _, pair in zip(range(room), waiting, strict=False)):
                running[pool.submit(ask, body)] = key
            if not running:
                break
            ready, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            if interrupt.received is not None and failure is None:
                text = (
                    f"Stopped by {interrupt.received}. What was answered is in {store.path}; the same command goes on."
                )
                failure = Interrupted(text)
            for future in ready:
                key, error = running.pop(future), future.exception()
                if error is None:
                    store.put(key, wanted[key], future.result())
                    done += 1
                    on_answer(done, total)
                elif isinstance(error, HostedError) and error.status in _OF_THE_REQUEST:
                    refused[key] = error
                    if done == 0 and len(refused) >= min(_REFUSED_IN_A_ROW, total) > 1:
                        failure = failure or error
                else:
                    failure = failure or error
            if failure is not None:
                client.stop()
    if failure is not None:
        raise failure
    return [answer if (answer := store.get(key)) is not None else refused[key] for key in keys]


def _slim(response: Mapping[str, Any]) -> dict[str, Any]:
    """Without `bytes` where the token's text is the same: they are most of a long answer's log-probabilities."""

    def token(entry: Mapping[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in entry.items() if k not in ("bytes", "top_logprobs")}
        if entry.get("bytes") is not None and bytes(entry["bytes"]) != str(entry.get("token")).encode():
            kept["bytes"] = entry["bytes"]
        if entry.get("top_logprobs"):
            kept["top_logprobs"] = [token(other) for other in entry["top_logprobs"]]
        return kept

    def choice(given: Mapping[str, Any]) -> dict[str, Any]:
        told = given.get("logprobs") or {}
        content = [token(entry) for entry in told.get("content") or ()]
        return {**given, "logprobs": {**told, "content": content}} if content else dict(given)

    return {**response, "choices": [choice(given) for given in response["choices"]]}
