"""Run folders as a finished run leaves them, with made-up predictions and figures measured from those."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tunefork.evaluate.summary import measure
from tunefork.recipe import Recipe, dump_recipe, make_recipe
from tunefork.run import RunFolder
from tunefork.tasks import Prediction, Task, make_task

TEXTS = (
    "The repair took two days longer than promised and nobody called.",
    "Lovely staff, and the new seats are really comfortable.",
    "The shop opens at nine and closes at six on weekdays.",
    "For anyone worried about the knee operation there, don't be: I wasn't rushed, nobody dismissed my fears, and the "
    "recovery was not half as painful as I had imagined.",
    "I would order again, though the parcel had clearly been dropped more than once on its way to me.",
)
SUMMARY = "From 6 May the bridge is closed to cars for two weeks while a cracked pier is bound in steel."


def labelled(
    labels: Sequence[str], right: float, n: int, seed: int, texts: Sequence[str] = TEXTS, shift: int = 1
) -> list[Prediction]:
    """Predictions on n rows, the golds the same whatever `seed`; a wrong one is the next class, or any."""
    golds = np.random.Generator(np.random.PCG64(99)).integers(len(labels), size=n)
    draws = np.random.Generator(np.random.PCG64(seed))
    found = []
    for i, g in enumerate(map(int, golds)):
        said = g if draws.random() < right else (g + (shift if draws.random() < 0.7 else 2)) % len(labels)
        rest = 0.3 / (len(labels) - 1)
        probabilities = tuple(0.7 if k == said else rest for k in range(len(labels)))
        found.append(Prediction(f"test.csv:{i + 2}", labels[said], labels[g], said, g, probabilities))
    return found


def answered(
    answers: Sequence[str], references: Sequence[str], loss: float, seed: int, **more: Any
) -> list[Prediction]:
    """Generated answers with their losses around `loss`."""
    draws = np.random.Generator(np.random.PCG64(seed))
    return [
        Prediction(
            f"test.jsonl:{i + 1}", said, right, loss=max(0.01, loss + 0.3 * draws.normal()), references=(right,), **more
        )
        for i, (said, right) in enumerate(zip(answers, references, strict=True))
    ]


def make_run(
    folder: Path,
    recipe: Mapping[str, Any],
    *,
    labels: Sequence[str] = (),
    test: Sequence[Prediction] = (),
    baselines: Mapping[str, Sequence[Prediction]] | None = None,
    texts: Sequence[str] | None = TEXTS,
    steps: int = 120,
    findings: Sequence[Mapping[str, Any]] | None = None,
    looks: bool = True,
    finished: bool = True,
) -> Path:
    """A run folder at `folder`; `texts` are given to the test rows in turn, None leaves them out."""
    whole = make_recipe(
        {"model": {"name": "models/fork-tiny", "kind": "causal", "device": "cpu", "dtype": "fp32"}, **recipe}
    )
    tree = whole.model_dump(mode="json")
    tree["model"]["max_length"], tree["train"]["batch_size"], tree["train"]["learning_rate"] = 128, 16, 2e-4
    whole = Recipe.model_validate(tree)
    task = make_task(whole.task, whole.data, "causal", (), labels=list(labels) or None)
    baselines = baselines or {}
    with RunFolder.create(folder, dump_recipe(whole)) as run:
        run.append_log(0, "plan", {"reasons": [], "forecast": {}})
        curve = _log(run, whole, task, steps, looks)
        _predictions(run, "test", test, texts)
        for name, said in baselines.items():
            _predictions(run, f"test-{name}", said, None)
        if finished:
            run.write_result(_result(whole, task, labels, test, baselines, steps, curve, findings))
    return folder


def classification_run(folder: Path, *, n: int = 400, right: float = 0.86, **more: Any) -> Path:
    """Three classes, LoRA beside four baselines."""
    labels = ("negative", "neutral", "positive")
    baselines = {
        "majority": [_called(p, labels, 0) for p in labelled(labels, 1, n, 1)],
        "tfidf": labelled(labels, 0.72, n, 2),
        "zero_shot": labelled(labels, 0.45, n, 3),
        "probe": labelled(labels, 0.78, n, 4),
    }
    settings: dict[str, Any] = {
        "recipe": {
            "task": "classification",
            "adapter": "lora",
            "data": {"train": "data/train.csv", "test": "data/test.csv"},
        },
        "labels": labels,
        "test": labelled(labels, right, n, 5),
        "baselines": baselines,
    }
    return make_run(folder, **{**settings, **more})


def _called(prediction: Prediction, labels: Sequence[str], index: int) -> Prediction:
    return Prediction(prediction.source, labels[index], prediction.gold, index, prediction.gold_index)


def zo_run(folder: Path) -> Path:
    """Trained for QWK by the method zo."""
    scores, n = ("0", "1", "2", "3"), 300
    return make_run(
        folder,
        {"task": "scoring", "adapter": "none", "train": {"method": "zo"}, "zo": {"objective": "qwk"}},
        labels=scores,
        test=labelled(scores, 0.7, n, 5),
        baselines={"probe": labelled(scores, 0.62, n, 4)},
    )


def many_classes_run(folder: Path) -> Path:
    labels = [
        f"{a} {b}"
        for a in ("card", "cash", "transfer", "top up", "exchange", "refund", "account")
        for b in (
            "not working",
            "delivery estimate",
            "pending",
            "declined",
            "charged twice",
            "limit",
            "fee",
            "arrival",
            "activate",
            "wrong amount",
            "lost or stolen",
        )
    ]
    return make_run(
        folder,
        {"task": "classification", "adapter": "none"},
        labels=labels,
        test=labelled(labels, 0.88, 1500, 5, shift=11),
        baselines={
            "majority": [_called(p, labels, 3) for p in labelled(labels, 1, 1500, 1)],
            "tfidf": labelled(labels, 0.87, 1500, 2),
        },
        steps=1500,
    )


def generation_run(folder: Path) -> Path:
    references = [f"{SUMMARY} Cars go round by way of Rushlow ({i})." for i in range(40)]
    ours = [f"The bridge is closed to cars from {i % 28 + 1} May while a pier is bound in steel." for i in range(40)]
    lead = ["The bridge over the Ashle in the middle of Penbury will be closed to cars for two weeks."] * 40
    return make_run(
        folder,
        {"task": "summary", "adapter": "lora"},
        test=answered(ours, references, 1.4, 1, stopped=True),
        baselines={
            "zero_shot": answered([f"Summary: the {'bridge ' * 40}"] * 40, references, 2.9, 2, stopped=False, cut=12),
            "lead3": [
                Prediction(p.source, p.predicted, p.gold, references=p.references)
                for p in answered(lead, references, 1, 3)
            ],
        },
        texts=("The bridge over the Ashle in the middle of Penbury will be closed to cars for two weeks. " * 6,),
    )


def chat_run(folder: Path) -> Path:
    references = ["Tuesday to Friday 9 to 6, and Saturday 10 to 4. The other days we are shut."] * 30
    return make_run(
        folder,
        {"task": "chat", "adapter": "lora"},
        test=[
            *answered(["Tuesday to Friday, 9 to 6."] * 28, references[:28], 0.9, 1, stopped=True),
            *[
                Prediction(
                    f"test.jsonl:{i}",
                    "We are we are we are " * 9,
                    references[0],
                    loss=1.5,
                    stopped=False,
                    references=(references[0],),
                )
                for i in (29, 30)
            ],
        ],
        baselines={"zero_shot": answered([""] * 30, references, 2.6, 2, stopped=False)},
        texts=("What are your opening hours this week?", "Could I drop in on a Sunday afternoon?"),
    )


def _log(run: RunFolder, recipe: Recipe, task: Task, steps: int, looks: bool) -> list[dict[str, Any]]:
    draws = np.random.Generator(np.random.PCG64(7))
    curve: list[dict[str, Any]] = []
    best = -math.inf
    for step in range(steps + 1):
        done = step / steps
        if step:
            _log_step(run, recipe, step, done, draws)
        if looks and step % max(1, steps // 10) == 0:
            value = 0.55 + 0.33 * (1 - math.exp(-4 * done)) + 0.015 * float(draws.normal())
            value = value if task.metric != "loss" else 2.9 - 2 * value
            score = value if task.metric != "loss" else -value
            look = {"step": step, "metric": task.metric, "value": value, "better": score > best, task.metric: value}
            best = max(best, score)
            curve.append(look)
            run.append_log(step, "look", look)
    return curve


def _log_step(run: RunFolder, recipe: Recipe, step: int, done: float, draws: np.random.Generator) -> None:
    rate = 2e-4 * min(1, done / 0.06) * (1 - done)
    loss = 0.3 + 0.9 * math.exp(-5 * done) + 0.12 * float(draws.normal())
    norm = None if step == 7 else 1.5 + float(draws.random())
    values = {
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": rate,
        "tokens": step * 640,
        "seconds": step * 0.2,
    }
    if recipe.train.method == "zo":
        del values["gradient_norm"]
        seen = {"projected_gradient": 4 + 3 * float(draws.random()), "queries": 8.0}
        values |= {**seen, "row_forwards": 2600.0 if step == 1 else 192.0, "objective": -loss}
    run.append_log(step, "step", values)


def _predictions(run: RunFolder, name: str, said: Sequence[Prediction], texts: Sequence[str] | None) -> None:
    lines = []
    for i, prediction in enumerate(said):
        text = {} if texts is None else {"text": texts[i % len(texts)]}
        lines.append(json.dumps({**asdict(prediction), **text}) + "\n")
    run.write_predictions(f"{name}.jsonl", "".join(lines))


FINDINGS: list[dict[str, Any]] = [
    {
        "level": "info",
        "code": "labels",
        "message": "3 labels; the most frequent, negative, is 41 % of the rows.",
        "count": 1,
        "examples": [],
        "advice": "",
        "split": "train",
    },
    {
        "level": "warning",
        "code": "duplicate",
        "message": "12 rows have a text that stands in an earlier row.",
        "count": 12,
        "examples": ["train.csv:14: as train.csv:3", "train.csv:80: as train.csv:22", "train.csv:91: as train.csv:4"],
        "advice": "Remove the later ones, unless the repetition is meant.",
        "split": "train",
    },
]


def _result(
    recipe: Recipe,
    task: Task,
    labels: Sequence[str],
    test: Sequence[Prediction],
    baselines: Mapping[str, Sequence[Prediction]],
    steps: int,
    curve: Sequence[Mapping[str, Any]],
    findings: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    def counts(rows: int) -> dict[str, int]:
        return {"rows": rows, "tokens": 41 * rows, "trained_tokens": 2 * rows, "longest": 97 if rows else 0}

    notes = {"tfidf": ["C=10, the best of 0.1, 1, 10, 100 on dev."]}
    better = [look["step"] for look in curve if look["better"]]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "reasons": [
            {"path": "model.dtype", "value": "fp32", "why": "this CPU has no fast bf16"},
            {"path": "model.max_length", "value": 128, "why": "the longest row has 97 tokens"},
            {"path": "train.learning_rate", "value": 2e-4, "why": "lora, 3M parameters"},
            {"path": "train.batch_size", "value": 16, "why": "16 rows, or all of them when there are fewer"},
        ],
        "data": {
            "counts": {"train": counts(960), "dev": counts(120 if curve else 0), "test": counts(len(test))},
            "origin": {
                "train": "data/train.csv, less dev",
                "dev": "carved from data/train.csv, seed 0",
                "test": "data/test.csv",
            },
            "findings": list(FINDINGS if findings is None else findings),
        },
        "model": {
            "name": "models/fork-tiny",
            "architecture": "LlamaForCausalLM",
            "parameters": 3_012_480,
            "fingerprint": "ab" * 32,
        },
        "rendering": {"form": task.form},
        "labels": list(labels),
        "environment": {
            "tunefork": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "bitsandbytes": None,
            "device": "cpu (Intel Xeon)",
            "dtype": "fp32",
            "threads": 2,
        },
        "steps": steps,
        "steps_per_epoch": 50,
        "forwards": steps * 16,
        "seconds": {"train": 0.2 * steps, "evaluate": 12.3},
        "peak_memory_bytes": {"kind": "anonymous memory above start-up", "value": 412_000_000, "forecast": 398_000_000},
        "train": {
            "stopped_early": False,
            "weights_from_step": better[-1] if better else steps,
            "looks": list(curve),
            "notes": [
                "Calibration: epsilon 0.003 is wide enough.",
                "The objective is evaluated with both sides in one pass.",
            ]
            if recipe.train.method == "zo"
            else [],
        },
        "metric": task.metric,
        "baselines": {name: measure(task, said, recipe.evaluate, recipe.seed) for name, said in baselines.items()},
        "baseline_notes": {
            name: {"seconds": 1.5 + i, "notes": notes.get(name, [])} for i, name in enumerate(baselines)
        },
        "test": measure(task, test, recipe.evaluate, recipe.seed),
    }
