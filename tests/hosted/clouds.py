"""Azure and Nebius as their pages describe them: paths, headers, states of files and jobs, and what they refuse."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.hosted.host import KEY

PAGE = {"object": "list", "has_more": False}


@dataclass
class Cloud:
    """What a service holds. `prefix`: where its API lies. Rules that are not kept are answered with 400."""

    prefix: str
    marked: bool = False  # files must begin with a byte-order mark
    flat: bool = False  # hyperparameters beside the model, whole numbers only, and no `method`
    names_models: bool = True  # whether a job says what its model is called
    reads: int = 2  # looks at a file until it is processed
    wrong: str = ""  # why it cannot read files
    url: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    deployed: set[str] = field(default_factory=set)
    queries: set[str] = field(default_factory=set)  # names of query parameters that were sent
    refused: list[str] = field(default_factory=list)
    says: dict[str, str | None] = field(default_factory=dict)  # to a last message; None: refused; else "teal"
    asked: list[dict[str, Any]] = field(default_factory=list)  # chat requests
    looks: int = 0

    def answer(self, method: str, path: str, data: bytes) -> tuple[int, Any]:
        body = json.loads(data) if data.startswith(b"{") else {}
        match (method, path.strip("/").split("/")):
            case "GET", ["files"]:
                return 200, {**PAGE, "data": list(self.files.values())}
            case "POST", ["files"]:
                return self.upload(data)
            case "GET", ["files", id]:
                self.looks += 1
                if self.looks >= self.reads:
                    state = {"status": "error", "status_details": self.wrong} if self.wrong else {"status": "processed"}
                    self.files[id] |= state
                return 200, self.files[id]
            case "GET", ["files", id, "content"]:
                return 200, self.contents[id]
            case "GET", ["fine_tuning", "jobs"]:
                return 200, {**PAGE, "data": self.jobs}
            case "POST", ["fine_tuning", "jobs"]:
                return self.begin(body)
            case "GET", ["fine_tuning", "jobs", _]:
                return 200, self.jobs[0]
            case "GET", ["fine_tuning", "jobs", _, "events" | "checkpoints"]:
                return 200, {**PAGE, "data": []}
            case "POST", ["chat", "completions"]:
                return self.chat(body)
        return 404, _error("no such path")

    def upload(self, data: bytes) -> tuple[int, Any]:
        head, _, content = data.partition(b"\r\n\r\n{") if not self.marked else data.partition(b"\xef\xbb\xbf")
        if self.marked and not content:
            return 400, _error("The file must be UTF-8 with a byte-order mark")
        found = re.search(rb'filename="([^"]+)"', data)
        assert found is not None and head
        id = f"file-{len(self.files)}"
        state = "pending" if self.marked else "processed"
        file = {"id": id, "object": "file", "bytes": len(data), "created_at": 1, "purpose": "fine-tune"}
        self.files[id] = file | {"filename": found[1].decode(), "status": state}
        return 201, self.files[id]

    def begin(self, body: dict[str, Any]) -> tuple[int, Any]:
        if any(self.files[body[k]]["status"] != "processed" for k in ("training_file", "validation_file")):
            return 400, _error("The file is not ready")
        if self.flat and "method" in body:
            return 400, _error("hyperparameters and method are not taken together")
        if self.flat and any(isinstance(v, str) for v in body.get("hyperparameters", {}).values()):
            return 400, _error("a number is wanted")
        for id, name, content in (("file-r", "results.csv", b"step,train_loss\n1,0.5\n"), ("file-w", "w.bin", b"\xff")):
            self.files[id] = {"id": id, "object": "file", "bytes": 1, "created_at": 1, "filename": name}
            self.files[id] |= {"purpose": "fine-tune-results", "status": "processed"}
            self.contents[id] = content
        made = f"{body['model']}.ft-b044a9d3cf9c4228" if self.names_models else None
        job = {"id": "ftjob-1", "object": "fine_tuning.job", "created_at": 1, "finished_at": 9, "status": "succeeded"}
        job |= {"fine_tuned_model": made, "result_files": ["file-r", "file-w"], "trained_tokens": 100, "error": None}
        self.jobs.append({**body, **job})
        return 201, self.jobs[0]

    def chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in self.deployed:
            return 404, _error("The API deployment for this resource does not exist", "DeploymentNotFound")
        self.asked.append(body)
        said = next((text for end, text in self.says.items() if end in body["messages"][-1]["content"]), "teal")
        if said is None:
            return 400, _error("The prompt was filtered", "content_filter")
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        head = {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"]}
        return 200, {**head, "choices": [choice], "usage": usage}


def _error(message: str, code: str = "BadRequest") -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


@contextmanager
def serving_cloud(cloud: Cloud) -> Iterator[Cloud]:
    """The cloud on a free port of this machine; a path, key or query that it does not know is refused."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            self.serve()

        def do_POST(self) -> None:
            self.serve()

        def serve(self) -> None:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            path, _, query = self.path.partition("?")
            cloud.queries |= {part.partition("=")[0] for part in query.split("&") if part}
            if not path.startswith(f"{cloud.prefix}/"):
                status, found = 404, _error(f"no such path: {path}")
            elif self.headers.get("authorization") != f"Bearer {KEY}":
                status, found = 401, _error("wrong key")
            else:
                status, found = cloud.answer(self.command, path.removeprefix(cloud.prefix), data)
            if status >= 400:
                cloud.refused.append(f"{status} {self.command} {path}")
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    cloud.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield cloud
    finally:
        server.shutdown()
        server.server_close()
