"""A small host for faults: counts requests, answers by rule, or passes them on to a real server; can fail on demand."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

KEY = "sk-secret-4f1b9c7e2d"
CUT, CUT_AFTER = "cut", "cut after"  # before the request is heard; after it was, and its answer is lost
Fault = str | tuple[int, Mapping[str, str], Mapping[str, Any]] | None


def refusal(status: int, code: str, message: str = "no", **headers: str) -> Fault:
    """An error as OpenAI's service writes it."""
    error = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return status, {k.replace("_", "-"): v for k, v in headers.items()}, error


def busy(status: int = 429) -> Fault:
    return refusal(status, "rate_limit_exceeded", "slow down", retry_after="0")


class Host:
    """What a host has heard and does. `fault(method, path, times this was heard)` says what goes wrong."""

    def __init__(self, behind: str | None = None) -> None:
        self.behind = behind
        self.fault: Callable[[str, str, int], Fault] = lambda method, path, times: None
        self.answer: Callable[[dict[str, Any]], str] = lambda body: body["messages"][-1]["content"].upper()
        self.delay = 0.0
        self.asked: Counter[str] = Counter()  # last message of each chat request that was heard
        self.heard: Counter[str] = Counter()  # "POST /files" …
        self.requests: Counter[str] = Counter()  # by content
        self.keys = {KEY}
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.url = ""

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self.answer(body)
        content = [
            {"token": part, "logprob": -0.1, "bytes": list(part.encode()), "top_logprobs": []}
            for part in text.split(" ")
        ]
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": {"content": content, "refusal": None} if body.get("logprobs") else None,
                }
            ],
            "usage": {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30},
        }


@contextmanager
def hosting(behind: str | None = None) -> Iterator[Host]:
    """A Host on a free port of this machine."""
    host = Host(behind)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            self.serve("GET")

        def do_POST(self) -> None:
            self.serve("POST")

        def do_DELETE(self) -> None:
            self.serve("DELETE")

        def serve(self, method: str) -> None:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            path = self.path.removeprefix("/v1")
            plain = path.partition("?")[0]
            chat = plain == "/chat/completions"
            with host.lock:
                digest = hashlib.sha256(data).hexdigest() if chat else ""
                host.requests[f"{method} {plain} {digest}"] += 1
                times = host.requests[f"{method} {plain} {digest}"]
                host.at_once += 1
                host.most_at_once = max(host.most_at_once, host.at_once)
            try:
                self.respond(method, path, plain, data, chat, times)
            finally:
                with host.lock:
                    host.at_once -= 1

        def respond(self, method: str, path: str, plain: str, data: bytes, chat: bool, times: int) -> None:
            if self.headers.get("authorization") != f"Bearer {KEY}" or KEY not in host.keys:
                shown = f"Incorrect API key provided: {self.headers.get('authorization')}"
                return self.reply(*refusal(401, "invalid_api_key", shown))  # type: ignore[misc]
            fault = host.fault(method, plain, times)
            if fault == CUT:
                return self.hang_up()
            if isinstance(fault, tuple):
                return self.reply(*fault)
            with host.lock:
                host.heard[f"{method} {plain}"] += 1
                if chat:
                    said = json.loads(data)["messages"][-1]["content"]
                    host.asked[said if isinstance(said, str) else json.dumps(said)] += 1
            time.sleep(host.delay)
            if host.behind is not None:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "authorization")}
                found = httpx.request(method, host.behind + path, content=data, headers=headers, timeout=60)
                status, content, kind = found.status_code, found.content, found.headers.get("content-type", "")
            else:
                status, kind = (200, "application/json") if chat else (404, "application/json")
                content = json.dumps(host.chat(json.loads(data)) if chat else {"error": {"message": "none"}}).encode()
            if fault == CUT_AFTER:
                return self.hang_up()
            self.send(status, kind, content, {})
            return None

        def reply(self, status: int, headers: Mapping[str, str], body: Mapping[str, Any]) -> None:
            self.send(status, "application/json", json.dumps(body).encode(), headers)

        def send(self, status: int, kind: str, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {"content-type": kind, "content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args: Any) -> None: ...  # a client that was killed is no news

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    host.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
