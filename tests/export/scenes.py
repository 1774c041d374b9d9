"""Finished runs on tiny models, each trained once a session."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.tiny import adapter_section
from tunefork.recipe import make_recipe
from tunefork.workflows.finetune import finetune

GOOD = ("fast delivery", "great service", "wonderful box", "one good film", "thank you")
BAD = ("terrible screen", "broke after two days", "bad report", "lost keys", "not again")

MakeRun = Callable[..., Path]


def write_rows(folder: Path) -> dict[str, str]:
    """Rows in two classes as text, the same as prompts with answers, and as chats."""
    rows = [
        (f"It was {a} and {b}", label)
        for label, words in (("good", GOOD), ("bad", BAD))
        for a in words
        for b in words
        if a != b
    ]
    with (folder / "labelled.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    answers = [{"prompt": text, "completion": f" {label} {label}"} for text, label in rows]
    (folder / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{label}!"}]}
        for text, label in rows
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    return {
        "classification": str(folder / "labelled.csv"),
        "generation": str(folder / "answers.jsonl"),
        "chat": str(folder / "chats.jsonl"),
    }


def run_maker(folder: Path, model: Callable[[str], Path]) -> MakeRun:
    """(kind, adapter, dtype="fp32", task="classification", learning_rate=0.02, **task settings) -> a finished run."""
    files = write_rows(folder)

    @cache
    def make(kind: str, adapter: str, dtype: str, task: str, rate: float, settings: str) -> Path:
        out = folder / f"run-{len(list(folder.iterdir()))}"
        more: Mapping[str, Any] = json.loads(settings)
        recipe = make_recipe(
            {
                "model": {"name": str(model(kind)), "dtype": dtype, "max_length": 64},
                "task": {"name": task, **more},
                "data": {"train": files[task], "test_fraction": 0.2, "dev_fraction": 0.3},
                "adapter": adapter_section(adapter),
                "train": {"max_steps": 12, "batch_size": 8, "learning_rate": rate, "keep_best": False},
                "evaluate": {"baselines": [], "bootstrap": 100},
                "out": str(out),
            }
        )
        return finetune(recipe).path

    def run(
        kind: str,
        adapter: str,
        dtype: str = "fp32",
        task: str = "classification",
        learning_rate: float = 0.02,
        **settings: Any,
    ) -> Path:
        return make(kind, adapter, dtype, task, learning_rate, json.dumps(settings))

    return run
