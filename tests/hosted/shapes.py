"""What this client sends and reads, against OpenAI's own mock of its published specification.

npx @stdy/cli openapi.yaml -p 4010 &              # github.com/openai/openai-openapi has the file
python -m tests.hosted.shapes http://127.0.0.1:4010

The mock answers 400 to a request that the specification does not know, and makes up replies that it does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tunefork.errors import Interrupted, TuneforkError
from tunefork.hosted import find_model, jobs
from tunefork.hosted.client import Client
from tunefork.migrate.inventory import inventory

CHOSEN = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
METHODS = {"supervised": CHOSEN, "dpo": {**CHOSEN, "beta": 0.1}}


def requests(url: str) -> dict[str, Callable[[], Any]]:
    client = Client(find_model(f"{url}#gpt-4.1-mini").service, patience=3)
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    body = {"model": "gpt-4.1-mini", "messages": messages, "temperature": 0, "stop": ["\n\n"]}
    body |= {"max_completion_tokens": 10, "logprobs": True, "top_logprobs": 20}
    job = {"seed": 0, "suffix": "x", "validation_file": "file-v"}
    return {
        "chat": lambda: client.chat(body),
        "upload": lambda: jobs.upload(client, "tunefork-x-train.jsonl", b"{}\n", time.sleep),
        **{
            f"begin {kind}": lambda kind=kind: jobs.begin(
                client,
                "file-t",
                "gpt-4.1-mini",
                job | {"method": {"type": kind, kind: {"hyperparameters": METHODS[kind]}}},
            )
            for kind in METHODS
        },
        "jobs": lambda: jobs.list_jobs(client),
        "checkpoints": lambda: jobs.checkpoints(client, "ftjob-1"),
        "follow": lambda: look(client),
        "cancel": lambda: jobs.cancel(client, "ftjob-1"),
        "result file": lambda: jobs.read_file(client, "file-1"),
        "inventory": lambda: inventory(url, client=client),
    }


def look(client: Client) -> None:
    """One look at a job and its events; what the mock makes up need not have ended."""

    def stop(seconds: float) -> None:
        raise Interrupted("one look is enough")

    with suppress(Interrupted):
        jobs.follow(client, "ftjob-1", (), lambda event: None, stop)


def main() -> int:
    os.environ.setdefault("TUNEFORK_API_KEY", "sk-any")
    refused = 0
    for name, ask in requests(sys.argv[1]).items():
        try:
            ask()
        except TuneforkError as error:
            refused += 1
            print(f"{name}: {error}")
        else:
            print(f"{name}: accepted")
    return min(refused, 1)


if __name__ == "__main__":
    sys.exit(main())
