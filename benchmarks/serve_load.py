"""Chats at once on the embedded model: requests a second and time to the first token, beside `transformers serve`.

python benchmarks/serve_load.py [--at 1 16 64] [--requests 64] [--json]

Every request is a stream of at most 32 tokens, greedy. `tunefork serve` answers over the base, over 1 and over 20
adapters, in fp32 as is its default on a processor, and over the base in bf16; `transformers serve` over the base alone,
in bf16 as is its default, without and with its continuous batching. Server and client share the cores that this process
may use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import torch

from tunefork.models import inspect_model, load_model, load_tokenizer, save_artefact
from tunefork.recipe import AdapterSection, ModelSection
from tunefork.server import Settings, Store
from tunefork.server.auth import DEFAULT_PROJECT
from tunefork.server.store import Job, Model

ADAPTERS, TOKENS = 20, 32
MODELS = "models: {fork-tiny: embedded, half: {name: embedded, dtype: bf16}}"
CONTINUOUS = ["--continuous-batching", "--cb-num-blocks", "128", "--cb-max-batch-tokens", "512"]  # 32,768 tokens
ASKED = ["Hello, who are you?", "Tell me of the sea.", "What is a king?", "Where does the rain go?"]


@dataclass(frozen=True)
class Figures:
    """Of one server at one number of chats at once."""

    server: str
    at_once: int
    requests_per_second: float
    tokens_per_second: float
    first_token_median: float  # seconds
    first_token_p95: float
    failed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=int, nargs="+", default=[1, 16, 64], help="chats at once")
    parser.add_argument("--requests", type=int, default=64, help="at each of them; 1 at once makes a quarter")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        data, base = Path(folder) / "data", inspect_model(ModelSection()).folder
        names = make_models(data)
        (models := Path(folder) / "models.yaml").write_text(MODELS)
        command = [sys.executable, "-m", "tunefork", "serve", "--data", str(data), "--models", str(models)]
        asked = {"base": ["fork-tiny"], "1 adapter": names[:1], f"{ADAPTERS} adapters": names, "base in bf16": ["half"]}
        with running(command, "/healthz") as url:
            for label, some in asked.items():
                found += measured(url, f"tunefork, {label}", some, given.at, given.requests)
        for label, more in {"base": [], "continuous": CONTINUOUS}.items():
            with running(["transformers", "serve", str(base), "--device", "cpu", *more], "/health") as url:
                found += measured(url, f"transformers, {label}", [str(base)], given.at, given.requests)
    cores = len(os.sched_getaffinity(0))
    if given.json:
        print(json.dumps({"cores": cores, "figures": [asdict(f) for f in found]}, indent=1))
        return
    print(f"{cores} core(s); up to {TOKENS} tokens a reply")
    print(f"{'':24} {'at once':>8} {'requests/s':>11} {'tokens/s':>9} {'first token, s':>15} {'p95':>7} {'failed':>7}")
    for f in found:
        rates = f"{f.requests_per_second:11.2f} {f.tokens_per_second:9.0f}"
        print(f"{f.server:24} {f.at_once:8} {rates} {f.first_token_median:15.3f} {f.first_token_p95:7.3f} {f.failed:7}")


def make_models(data: Path) -> list[str]:
    """Names of adapters that training might have left, in a server's folder."""
    data.mkdir()
    settings = Settings(data=data)
    store, facts = Store(settings), inspect_model(ModelSection())
    tokenizer, names = load_tokenizer(facts), []
    job = Job(
        id="ftjob-load", project_id=DEFAULT_PROJECT, key_id="k", status="succeeded", base="fork-tiny",
        asked_model="fork-tiny", model_name="none", training_file="f", seed=0,
        method={"type": "supervised", "hyperparameters": {}},
    )  # fmt: skip
    with store.write() as db:
        db.add(job)
        db.flush()
        for number in range(ADAPTERS):
            model = load_model(
                facts,
                form="text",
                labels=(),
                adapter=AdapterSection(name="lora", rank=8),
                device=torch.device("cpu"),
                dtype=torch.float32,
                seed=number,
                activation_checkpointing=False,
                prefix_examples=None,
            )
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
            save_artefact(model, tokenizer, facts, settings.jobs_path / job.id / f"m{number}", {})
            names.append(f"ft:fork-tiny:tunefork:load:{number}")
            values = {"project_id": DEFAULT_PROJECT, "job_id": job.id, "base": "fork-tiny", "folder": f"m{number}"}
            db.add(Model(id=f"model_{number}", name=names[-1], **values))
    store.close()
    return names


@contextmanager
def running(command: list[str], health: str) -> Iterator[str]:
    """A server on a free port of this machine; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = subprocess.DEVNULL
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                if httpx.get(url + health).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(command[:3])} does not answer")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def measured(url: str, server: str, models: Sequence[str], at: Sequence[int], requests: int) -> list[Figures]:
    asyncio.run(load(url, models, len(models), len(models)))  # all are in memory, or have been
    found = []
    for at_once in at:
        count = max(at_once, requests if at_once > 1 else requests // 4)
        started = time.perf_counter()
        told = asyncio.run(load(url, models, at_once, count))
        seconds = time.perf_counter() - started
        firsts = sorted(first for first, _ in told if first is not None) or [float("nan")]
        found.append(
            Figures(
                server,
                at_once,
                len(told) / seconds,
                sum(tokens for _, tokens in told) / seconds,
                statistics.median(firsts),
                firsts[int(0.95 * (len(firsts) - 1))],
                sum(first is None for first, _ in told),
            )
        )
    return found


async def load(url: str, models: Sequence[str], at_once: int, count: int) -> list[tuple[float | None, int]]:
    """(seconds to the first token, tokens) of each of `count` chats; None for one that failed."""
    left = iter(range(count))
    told: list[tuple[float | None, int]] = []

    async def client(http: httpx.AsyncClient) -> None:
        for number in left:
            content = ASKED[number % len(ASKED)]
            body = {
                "model": models[number % len(models)],
                "messages": [{"role": "user", "content": content}],
                "max_tokens": TOKENS,
                "temperature": 0,
                "stream": True,
            }
            started, first, tokens = time.perf_counter(), None, 0
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
                async for line in reply.aiter_lines():
                    if reply.status_code == 200 and '"content":"' in line and '"content":""' not in line:
                        first, tokens = first or time.perf_counter() - started, tokens + 1
            told.append((first, tokens))

    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(timeout=300, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(at_once)))
    return told


if __name__ == "__main__":
    main()
