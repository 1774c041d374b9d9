"""Servers on loopback ports, clients for them, and files to train on."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from tunefork.models import inspect_model, load_tokenizer
from tunefork.recipe import ModelSection
from tunefork.server import Settings, Store, create_app

ANSWERS = ("blue", "green", "red")


def rows(count: int = 10) -> bytes:
    """Conversations with one short reply each, as the lines of a training file."""
    lines = []
    for i in range(count):
        asked = {"role": "user", "content": f"Which colour has number {i}?"}
        reply = {"role": "assistant", "content": ANSWERS[i % 3]}
        lines.append(json.dumps({"messages": [asked, reply]}))
    return "\n".join(lines).encode()


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """A server in a thread, on a free port; gives its base URL."""
    store = Store(settings)
    server = uvicorn.Server(uvicorn.Config(create_app(settings, store), log_level="warning", access_log=False))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()
            store.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def server_process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`tunefork serve` in a process of its own, to be killed; gives the process and its base URL."""
    port = free_port()
    command = [sys.executable, "-m", "tunefork", "serve", "--data", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(command)
    root = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or server_answers(f"{root}/readyz"))
        yield process, f"{root}/v1"
    finally:
        process.terminate()
        process.wait()


def server_answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def client_of(url: str, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


def settings_in(folder: Path, **values: Any) -> Settings:
    """No slot by default: files are validated, and nothing is trained."""
    folder.mkdir(exist_ok=True)
    return Settings(data=folder, **{"slots": 0, **values})


def wait_for(happened: Callable[[], Any], seconds: float = 600) -> Any:
    """What `happened` returns, once it is true. The time is for what hangs: a machine may be shared by many."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := happened():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} seconds")


def word_ids() -> dict[str, str]:
    """Ids of two words among fork-tiny's tokens, as `logit_bias` and the scripts in `clients/` want them."""
    tokenizer = load_tokenizer(inspect_model(ModelSection()))
    return {word: str(tokenizer(word, add_special_tokens=False)["input_ids"][0]) for word in ("Yes", "No")}


def pip_refuses(*command: str) -> str:
    """Runs pip; the last line of what it says if it fails."""
    pip = [sys.executable, "-m", "pip", *command, "--quiet", "--disable-pip-version-check"]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        return "pip took too long"
    return (done.stderr.strip().splitlines() or ["pip failed"])[-1] if done.returncode else ""
