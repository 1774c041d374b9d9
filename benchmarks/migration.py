"""Three tuned models leave our own service, which plays the host: inventory, record, retrain, compare, one page.

python benchmarks/migration.py OUT [--rows 120] [--valid 40] [--epochs 3]
"""

from __future__ import annotations

import argparse
import csv
import json
import socket
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import httpx
import openai

from tunefork.files import write_atomic
from tunefork.migrate import record
from tunefork.migrate.compare import compare
from tunefork.migrate.inventory import inventory
from tunefork.migrate.retrain import retrain
from tunefork.report import render_migration

STYLES = {  # how each model was taught to answer
    "word": {"positive": "positive", "negative": "negative", "neutral": "neutral"},
    "sentence": {
        "positive": "This customer is happy.",
        "negative": "This customer is unhappy.",
        "neutral": "This customer only reports.",
    },
    "letter": {"positive": "P", "negative": "N", "neutral": "O"},
}


def conversations(split: str, count: int, style: str) -> bytes:
    """Rows of the embedded feedback as a service's training file."""
    text = (files("tunefork") / "assets" / "feedback" / f"{split}.csv").read_text(encoding="utf-8")
    lines = []
    for row in list(csv.DictReader(text.splitlines()))[:count]:
        answer = STYLES[style].get(row["label"], row["label"])
        messages = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    return "".join(lines).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--valid", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tunefork", "serve", "--data", str(given.out / "host"), "--port", str(port)]
    url = f"http://127.0.0.1:{port}/v1"
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "host.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/readyz")
        started = time.perf_counter()
        tune(url, given)
        tuned = time.perf_counter() - started
        models = inventory(url, given.out / "inventory.json")
        found = []
        for model in models:
            folder = given.out / model.model.rpartition("#")[2].split(":")[3]
            started = time.perf_counter()
            record(model.model, folder, confirm=lambda estimate: True)
            recorded = time.perf_counter()
            sets = {"train.epochs": given.epochs, "train.batch_size": 8}
            runs = retrain(folder, "embedded", folder / "runs", methods=["backprop/lora", "backprop/none"], sets=sets)
            retrained = time.perf_counter()
            found.append(compare(folder, runs["chosen"]))
            compared = time.perf_counter()
            same, first = found[-1]["agreement"]["exact_match"], found[-1]["scores"][0]
            print(
                f"{folder.name:9} recorded {same['n']} answers in "
                f"{recorded - started:.0f} s; retrained in {retrained - recorded:.0f} s, chose {runs['chosen'][-13:]}; "
                f"compared in {compared - retrained:.0f} s; same {same['value']:.3f} ({same['low']:.3f} to "
                f"{same['high']:.3f}); right before {first['old']['value']:.3f}, now {first['new']['value']:.3f}, "
                f"difference {first['difference']['low']:+.3f} to {first['difference']['high']:+.3f}",
                flush=True,
            )
        write_atomic(given.out / "migration.html", render_migration(found))
        print(f"tuned three models in {tuned:.0f} s; {given.out / 'migration.html'}")
    finally:
        server.terminate()
        server.wait()


def tune(url: str, given: argparse.Namespace) -> None:
    """Three jobs through the official client, to their end."""
    client = openai.OpenAI(base_url=url, api_key="any")
    jobs = []
    for style in STYLES:
        ids = [
            client.files.create(
                file=(f"{style}-{split}.jsonl", conversations(split, count, style)), purpose="fine-tune"
            ).id
            for split, count in (("train", given.rows), ("dev", given.valid))
        ]
        hyperparameters = {"n_epochs": given.epochs, "batch_size": 8}
        method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        job = client.fine_tuning.jobs.create(
            model="fork-tiny", training_file=ids[0], validation_file=ids[1], suffix=style, seed=1, method=method
        )
        jobs.append(job.id)
    while any(client.fine_tuning.jobs.retrieve(id).status not in ("succeeded", "failed") for id in jobs):
        time.sleep(1)


def wait_until_ready(url: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("the service did not start")


if __name__ == "__main__":
    main()
