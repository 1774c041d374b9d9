"""Zeroth-order training for the metric itself against training for cross-entropy, for the same row-forwards.

    python benchmarks/zo_objective.py DATA [--only qwk macro_f1] [--minutes 10] [--seeds 2] [--device cuda] [--json]

DATA is a folder of data sets in JSON lines. `qwk` is item 1 of ASAP-SAS, `macro_f1` is TREC, both with all-MiniLM-L6-v2
(64 tokens). The head starts as a linear probe of 300 training rows; the method zo then trains on the other rows, with
the preset, the batch size and the calibration that it has by itself, the rate falling to zero. The calibration's
row-forwards count. The budget is what fits into the minutes given, measured on a few steps and the same for both goals
and all seeds. The test rows are read once, at the end: the difference of the metric with a paired bootstrap interval,
in which a row stands for its predictions of all seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from real_data import minilm
from tunefork.evaluate.harness import predict_examples
from tunefork.evaluate.objective import make_objective
from tunefork.evaluate.start import start_head_from_probe
from tunefork.methods import make_method
from tunefork.metrics import PairableStatistic, paired_difference
from tunefork.models import load_model, torch_dtype
from tunefork.recipe import Recipe, make_recipe
from tunefork.render import Rendered
from tunefork.tasks import Prediction, row_losses
from tunefork.train.prepare import Job, prepare
from tunefork.train.sampler import micro_batches, sampler_of

HEAD_ROWS = 300
TIMED = 10  # steps of each goal that say how many row-forwards a second there are


def asap_sas(data: Path, scratch: Path) -> dict[str, str]:
    """Item 1: the first rater's scores to learn from, the resolved ones to be measured by."""
    files = {}
    for split, score in (("train", "score1"), ("test", "score")):
        rows = [json.loads(line) for line in (data / "asap_sas" / f"{split}.jsonl").read_text().splitlines()]
        kept = [{"text": row["text"], "label": row[score]} for row in rows if row["essay_set"] == 1]
        files[split] = str(scratch / f"asap_sas_1_{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in kept))
    return files


def recipe(metric: str, files: dict[str, str], objective: str, device: str) -> Recipe:
    return make_recipe(
        {
            "model": {"name": minilm(), "max_length": 64, "device": device, "dtype": "fp32"},
            "task": {"name": "scoring" if metric == "qwk" else "trec", "metric": metric},
            "adapter": "none",
            "data": files | {"dev_fraction": 0.001, "max_leaked": 1.0, "max_conflicts": 1.0, "max_cut": 1.0},
            "train": {"method": "zo", "micro_batch_size": 16},
            "zo": {"objective": objective},
            "evaluate": {"baselines": []},
        }
    )


class Run:
    """One goal on one seed, from the same start as the other."""

    def __init__(self, job: Job, start: torch.nn.Module, rows: list[Rendered], seed: int) -> None:
        self.job, self.rows, self.model = job, rows, copy.deepcopy(start)
        chosen = job.recipe.model_copy(update={"seed": seed})
        objective = make_objective(chosen.zo.objective, job.asking(), rows)
        self.method = make_method(self.model, chosen, objective=objective)
        self.sampler = sampler_of(rows, chosen.train, seed)
        self.steps, self.forwards, self.notes = 0, 0, []

    def step(self, share: float) -> None:
        """`share` of the calibrated learning rate."""
        train = self.job.recipe.train
        lengths = [len(row.ids) for row in self.rows]
        groups = micro_batches(self.sampler.step(self.steps), lengths, int(train.micro_batch_size))
        batches = [
            replace(self.job.renderer.batch([self.rows[i] for i in g], learn=True), places=torch.tensor(g)).to(
                self.job.device
            )
            for g in groups
        ]
        done = self.method.step(batches, row_losses, share)
        self.steps, self.forwards = self.steps + 1, self.forwards + done.forwards
        self.notes += done.notes

    def train(self, budget: int) -> None:
        while self.forwards < budget:
            self.step(max(0.0, 1 - self.forwards / budget))

    def predictions(self) -> list[Prediction]:
        return predict_examples(self.model, self.job.asking(), self.job.examples["test"])


def load(job: Job) -> torch.nn.Module:
    return load_model(
        job.facts,
        form=job.task.form,
        labels=job.task.labels,
        adapter=job.recipe.adapter,
        device=job.device,
        dtype=torch_dtype(job.recipe.model.dtype),
        seed=0,
        activation_checkpointing=False,
        prefix_examples=None,
        frozen=True,
    )


def measured(job: Job, predictions: list[Prediction]) -> PairableStatistic:
    statistic = job.task.statistics(predictions)[0]
    assert isinstance(statistic, PairableStatistic)
    return statistic


def compare(metric: str, files: dict[str, str], minutes: float, seeds: int, device: str) -> dict[str, Any]:
    jobs = {goal: prepare(recipe(metric, files, goal, device)) for goal in ("loss", metric)}
    job = jobs[metric]
    rows = [job.rendered["train"][i] for i in np.random.default_rng(0).permutation(len(job.rendered["train"]))]
    start = load(job)
    start_head_from_probe(start, job.asking(), rows[:HEAD_ROWS], seed=0)
    rows = rows[HEAD_ROWS:]
    spent = 0.0
    for goal in jobs:  # of a first try, thrown away
        trial = Run(jobs[goal], start, rows, seed=99)
        trial.step(1.0)
        before, begun = trial.forwards, time.perf_counter()
        for _ in range(TIMED):
            trial.step(1.0)
        spent = max(spent, (time.perf_counter() - begun) / (trial.forwards - before))
    budget = int(60 * minutes / (2 * seeds * spent)) // 1000 * 1000
    said: dict[str, list[Prediction]] = {goal: [] for goal in jobs}
    about: dict[str, Any] = {"budget": budget, "train_rows": len(rows), "seconds_a_row": spent, "runs": []}
    for seed in range(seeds):
        for goal in jobs:
            run, begun = Run(jobs[goal], start, rows, seed), time.perf_counter()
            run.train(budget)
            found = run.predictions()
            said[goal] += found
            value = measured(job, found)(np.arange(len(found)))
            about["runs"].append(
                {
                    "goal": goal,
                    "seed": seed,
                    metric: value,
                    "loss": float(np.mean([-np.log(p.probabilities[p.gold_index or 0]) for p in found])),
                    "steps": run.steps,
                    "forwards": run.forwards,
                    "seconds": time.perf_counter() - begun,
                    "notes": run.notes,
                }
            )
    first = predict_examples(start, job.asking(), job.examples["test"])
    about["start"] = measured(job, first)(np.arange(len(first)))
    a, b = (measured(job, said[goal]) for goal in (metric, "loss"))
    paired = paired_difference(a, b, len(a), groups=[p.source for p in said[metric]])
    about["difference"] = {"value": paired.difference, "low": paired.low, "high": paired.high, "p": paired.p_value}
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", default=["qwk", "macro_f1"])
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each data set")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for metric in options.only:
            trec = {split: str(options.data / "trec" / f"{split}.jsonl") for split in ("train", "test")}
            files = trec if metric == "macro_f1" else asap_sas(options.data, Path(scratch))
            found[metric] = about = compare(metric, files, options.minutes, options.seeds, options.device)
            if options.json:
                continue
            print(f"{metric}: start {about['start']:.3f}, {about['budget']:,} row-forwards, {about['train_rows']} rows")
            for run in about["runs"]:
                shown = f"{metric} {run[metric]:.3f} loss {run['loss']:.3f} {run['steps']} steps {run['seconds']:.0f} s"
                print(f"  {run['goal']} seed {run['seed']}: {shown}\n    {' '.join(run['notes'])}")
            print("  difference {value:+.3f} ({low:+.3f} to {high:+.3f}), p {p:.3f}".format(**about["difference"]))
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
