"""What zeroth-order training learns for a budget of row-forwards: `default` against MeZO as published.

    python benchmarks/zo_learning.py DATA [--beds trec_minilm ...] [--budget 320000] [--seeds 3] [--jobs 2] [--json]

DATA is a folder of data sets in JSON lines (trec/train.jsonl …). A row-forward is one row through the model once; the
calibration's are counted. Per testbed and method: learning rates are tried on one seed with a tenth of the budget, and
the one with the lowest dev loss is run with every seed; where one of those ends worse than it was at a tenth, or not at
all, the next lower rate in turn. MeZO, at a constant rate as published, is read at a tenth, a quarter, a half and all
of the budget. `default` takes the product's schedule, so each budget is a run of its own: a tenth, a quarter, a third
and all. Back-propagation (AdamW, over LoRA or all weights) gets the seconds that `default` took beside as many other
processes. MeZO is
`benchmarks/mezo.py`, which shares no code with the package. At the end: how little of MeZO's budget brought `default`
to MeZO's final loss and accuracy (means over the seeds), and how many half-decades of learning rates come within a
point of each method's best (`default` holds a rate above the calibrated one there). The testbeds were fixed before
methods were compared:

- trec_minilm, sst2_minilm: all-MiniLM-L6-v2 with the linear probe as its head.
- trec_prompted: the embedded model, first tuned by back-propagation on the prompts of other tasks (AG News, SST-2,
  RTE), then asked TREC's, which it has not seen.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from mezo import MeZO
from real_data import minilm
from tunefork.batch import Batch
from tunefork.errors import TrainingError
from tunefork.evaluate.start import start_head_from_probe
from tunefork.methods.zo import ZerothOrder
from tunefork.models import load_model, torch_dtype
from tunefork.recipe import make_recipe
from tunefork.recipe.schema import TrainSection
from tunefork.tasks import row_losses
from tunefork.tasks.loss import row_scores
from tunefork.train.prepare import Job, prepare
from tunefork.train.sampler import sampler_of
from tunefork.train.schedule import learning_rate
from tunefork.workflows import finetune
from tunefork.zo import ZO
from tunefork.zo.options import preset_of

READ_AT = (0.1, 0.25, 0.5, 1.0)
BUDGETS = {"default": (0.1, 0.25, 1 / 3, 1.0)}  # shares of the budget that are runs of their own
BATCH = 16
PRESETS = {"default": preset_of("default")}  # which rows a step sees, where the method says
SCHEDULE: dict[str, Any] = {"schedule": TrainSection().schedule, "warmup": TrainSection().warmup}
WORDS = {"DESC": "meaning", "ENTY": "thing", "ABBR": "letters", "HUM": "person", "LOC": "place", "NUM": "count"}
"""TREC's classes as words of one token each in the embedded model, so that a row is one sequence."""

GRIDS = {  # half decades
    "mezo": [10.0 ** (k / 2) for k in range(-14, -7)],
    "default": [10.0 ** (k / 2) for k in range(-3, 4)],  # times the calibrated one
    "lora": [1e-4, 3e-4, 1e-3, 3e-3],
    "full": [1e-5, 3e-5, 1e-4, 3e-4],
}


@dataclass
class Bed:
    """A model at its start, rows to train on, and rows to look at."""

    name: str
    job: Job
    model: torch.nn.Module

    def batches(self, seed: int, method: str) -> Iterator[Batch]:
        rows, preset = self.job.rendered["train"], PRESETS.get(method)
        options = {
            "batch_size": preset.batch if preset else BATCH,
            "sampling": preset.sampling if preset else "shuffled",
        }
        sampler = sampler_of(rows, self.job.recipe.train.model_copy(update=options), seed)
        step = 0
        while True:
            yield self.job.renderer.batch([rows[i] for i in sampler.step(step)], learn=True).to(self.job.device)
            step += 1

    @torch.no_grad()
    def look(self, model: torch.nn.Module) -> dict[str, float]:
        """Loss and accuracy on dev."""
        rows = sorted(self.job.rendered["dev"], key=lambda r: len(r.ids))
        right, loss = 0.0, 0.0
        model.eval()
        for start in range(0, len(rows), 64):
            batch = self.job.renderer.batch(rows[start : start + 64], learn=True).to(self.job.device)
            assert batch.gold is not None
            scores = row_scores(model, batch)
            right += float((scores.argmax(1) == batch.gold).sum())
            loss -= float(scores.gather(1, batch.gold[:, None]).sum())
        return {"loss": loss / len(rows), "accuracy": right / len(rows)}


def load(job: Job) -> torch.nn.Module:
    recipe = job.recipe
    return load_model(
        job.facts,
        form=job.task.form,
        labels=job.task.labels,
        adapter=recipe.adapter,
        device=job.device,
        dtype=torch_dtype(recipe.model.dtype),
        seed=0,
        activation_checkpointing=False,
        prefix_examples=None,
        frozen=True,
    )


def with_probe(data: Path, task: str, rows: int, device: str, dtype: str) -> Bed:
    files = {
        "train": str(data / task / "train.jsonl"),
        "dev": str(data / task / ("dev" if task == "sst2" else "test")) + ".jsonl",
    }
    recipe = {
        "model": {"name": minilm(), "device": device, "dtype": dtype},
        "task": task,
        "adapter": "none",
        "train": {"method": "zo"},
        "evaluate": {"baselines": []},
    }
    job = prepare(
        make_recipe(
            recipe | {"data": files | {"train_rows": rows, "dev_rows": 500, "test_fraction": 0, "max_leaked": 1.0}}
        )
    )
    model = load(job)
    start_head_from_probe(model, job.asking(), job.rendered["train"], seed=0)
    return Bed(f"{task}_minilm", job, model)


def tune_on_prompts(data: Path, folder: Path) -> None:
    """Puts into `folder` the embedded model after other tasks' prompts. Every row is text: prompt and answer."""
    rows: list[dict[str, str]] = []
    for task, size in (("ag_news", 3000), ("sst2", 3000), ("rte", 2000)):
        split = {
            "train": str(data / task / "train.jsonl"),
            "train_rows": size,
            "test_fraction": 0,
            "max_leaked": 1.0,
            "max_conflicts": 1.0,
        }
        job = prepare(make_recipe({"model": "embedded", "task": task, "data": split, "evaluate": {"baselines": []}}))
        rows += [
            {"prompt": e.prompt, "completion": e.candidates[e.gold]}
            for e in job.examples["train"]
            if e.gold is not None
        ]
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(len(rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
    finetune(
        {
            "model": {"name": "embedded", "max_length": 128},
            "task": "generation",
            "adapter": "none",
            "data": {
                "train": str(folder / "prompts.jsonl"),
                "dev_rows": 100,
                "test_rows": 2,
                "max_cut": 1.0,
                "max_conflicts": 1.0,
                "max_leaked": 1.0,
            },
            "train": {"epochs": 2},
            "evaluate": {"baselines": []},
            "out": str(folder / "tuned"),
        }
    )


def prompted(data: Path, folder: Path, device: str, dtype: str) -> Bed:
    """What `tune_on_prompts` made, asked TREC's."""
    files = {
        "train": str(data / "trec" / "train.jsonl"),
        "dev": str(data / "trec" / "test.jsonl"),
        "test_fraction": 0,
        "max_leaked": 1.0,
        "labels": WORDS,
    }
    model = {"name": str(folder / "tuned" / "model"), "device": device, "dtype": dtype}
    recipe = {"model": model, "task": "trec", "adapter": "none", "train": {"method": "zo"}}
    job = prepare(make_recipe(recipe | {"data": files, "evaluate": {"baselines": []}}))
    return Bed("trec_prompted", job, load(job))


@lru_cache(maxsize=1)
def bed_of(name: str, data: Path, folder: Path, device: str, dtype: str = "fp32") -> Bed:
    if name == "trec_prompted":
        return prompted(data, folder, device, dtype)
    return with_probe(data, name.partition("_")[0], 2000, device, dtype)


def mean_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return row_losses(model, batch).sum() / batch.weights.sum()


Step = Callable[[Batch, float], int]
"""One step on a batch at a share of the budget; the row-forwards it took."""


def mezo(bed: Bed, model: torch.nn.Module, lr: float, seed: int) -> tuple[Step, dict[str, Any]]:
    model.requires_grad_(True)
    optimizer = MeZO(model, lr=lr, epsilon=1e-3, seed=seed, keep_noise=True)

    def step(batch: Batch, progress: float) -> int:
        optimizer.step(lambda: mean_loss(model, batch))
        if not math.isfinite(optimizer.projected_gradient):
            raise FloatingPointError
        return 2 * batch.rows

    return step, {}


def default(bed: Bed, model: torch.nn.Module, lr: float, seed: int) -> tuple[Step, dict[str, Any]]:
    method = ZerothOrder(model, bed.job.recipe, ZO(model, seed=seed))
    peak = min(lr, 1.0)  # of the calibrated rate, at which the product holds a higher one
    said: dict[str, Any] = {"notes": []}

    def step(batch: Batch, progress: float) -> int:
        share = learning_rate(int(1e6 * progress), peak=peak, steps=1_000_000, **SCHEDULE)
        done = method.step([batch], row_losses, share)
        said["notes"] += done.notes
        return done.forwards

    return step, said


def lora(bed: Bed, model: torch.nn.Module, lr: float, seed: int) -> tuple[Step, dict[str, Any]]:
    """AdamW on LoRA of rank 16 over the same matrices."""
    from peft import LoraConfig, get_peft_model

    heads = [n for n, _ in model.named_children() if n in ("classifier", "score")]
    torch.manual_seed(seed)
    wrapped = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=heads or None)
    )  # pyright: ignore
    return adamw(model, wrapped, lr), {}


def full(bed: Bed, model: torch.nn.Module, lr: float, seed: int) -> tuple[Step, dict[str, Any]]:
    """AdamW on all weights."""
    torch.manual_seed(seed)
    return adamw(model, model.requires_grad_(True), lr), {}


def adamw(model: torch.nn.Module, trained: torch.nn.Module, lr: float) -> Step:
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

    def step(batch: Batch, progress: float) -> int:
        with torch.enable_grad():
            trained.train()
            mean_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return batch.rows

    return step


METHODS = {"mezo": mezo, "default": default, "lora": lora, "full": full}
TIMED = ("lora", "full")  # by the seconds that `default` took


def run(bed: Bed, method: str, lr: float, seed: int, budget: int, seconds: float = math.inf) -> dict[str, Any]:
    """Trains a copy until the budget of row-forwards, or of seconds, is used up."""
    model = copy.deepcopy(bed.model)
    step, said = METHODS[method](bed, model, lr, seed)
    looks, used, spent = [], 0, 0.0
    marks = [budget * share for share in READ_AT]
    for batch in bed.batches(seed, method):
        started = time.perf_counter()
        try:
            used += step(batch, used / budget)
        except (FloatingPointError, TrainingError):
            break
        spent += time.perf_counter() - started
        over = spent >= seconds
        while marks and (used >= marks[0] or over):
            looks.append({"forwards": used, "seconds": spent, **bed.look(model)})
            marks = [] if over else marks[1:]
        if not marks:
            break
    final = looks[-1] if looks and len(marks) == 0 else {"loss": math.inf, "accuracy": 0.0}
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "looks": looks,
        **said,
        "loss": final["loss"],
        "accuracy": final["accuracy"],
        "seconds": spent,
    }


class Work(NamedTuple):
    """One run, for a process that makes the testbed itself."""

    place: tuple[str, Path, Path, str, str]  # of `bed_of`
    method: str
    lr: float
    seed: int
    budget: int
    seconds: float = math.inf

    def __call__(self) -> dict[str, Any]:
        torch.set_num_threads(1)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return run(bed_of(*self.place), self.method, self.lr, self.seed, self.budget, self.seconds)


def call(work: Work) -> dict[str, Any]:
    return work()


def compare(
    place: tuple[str, Path, Path, str, str],
    methods: list[str],
    budget: int,
    seeds: int,
    pool: Executor,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The grids of all methods, then the runs of all; those of back-propagation come last, for as long as `default`."""
    bed = bed_of(*place)
    found: dict[str, Any] = {"start": bed.look(copy.deepcopy(bed.model)), "grid": {}, "runs": {}}
    say(f"{bed.name}: start {found['start']}")
    seconds = math.inf
    for together in ([m for m in methods if m not in TIMED], [m for m in methods if m in TIMED]):
        grids = [Work(place, m, lr, 0, budget // 10, seconds / 10) for m in together for lr in GRIDS[m]]
        for work, done in zip(grids, pool.map(call, grids), strict=True):
            found["grid"].setdefault(work.method, []).append(done)
            say(f"  grid {work.method} {work.lr:.2g}: loss {done['loss']:.4f} accuracy {done['accuracy']:.3f}")
        waiting = {m: sorted(found["grid"][m], key=lambda r: r["loss"]) for m in together}
        while waiting:
            works = []
            for method, (best, *_) in waiting.items():
                for share, seed in itertools.product(BUDGETS.get(method, (1.0,)), range(seeds)):
                    works.append((share, Work(place, method, best["lr"], seed, int(budget * share), seconds)))
            works.sort(key=lambda work: -work[0])
            runs: dict[str, list[dict[str, Any]]] = {}
            for (share, work), done in zip(works, pool.map(call, [work for _, work in works]), strict=True):
                runs.setdefault(work.method, []).append({"share": share, **done})
                shown = " ".join(f"{k['forwards']}:{k['loss']:.4f}/{k['accuracy']:.3f}" for k in done["looks"])
                say(f"  {work.method} lr {work.lr:.2g} seed {work.seed}: {shown} ({done['seconds']:.0f} s)")
            for method, some in runs.items():
                held = all(math.isfinite(r["loss"]) and r["loss"] <= r["looks"][0]["loss"] for r in some)
                lower = [r for r in waiting.pop(method) if r["lr"] < some[0]["lr"]]
                if held or not lower:
                    found["runs"][method] = some
                else:
                    waiting[method] = lower
        if "default" in together:
            seconds = float(np.mean([r["seconds"] for r in found["runs"]["default"] if r["share"] == 1.0]))
    found["summary"] = summary(found)
    say(f"  {found['summary']}")
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds by method and share, widths of the grids, and the share at which MeZO's end is reached."""
    ends: dict[str, dict[float, dict[str, float]]] = {}
    for method, runs in found["runs"].items():
        for share in sorted({r["share"] for r in runs}):
            some = [r for r in runs if r["share"] == share]
            ends.setdefault(method, {})[round(share, 3)] = {
                name: float(np.mean([r[name] for r in some])) for name in ("loss", "accuracy", "seconds")
            }
    wide = {
        method: sum(r["accuracy"] >= max(g["accuracy"] for g in grid) - 0.01 for r in grid) - 1
        for method, grid in found["grid"].items()
    }
    reached: dict[str, float | None] = {}
    if "mezo" in ends and "default" in ends:
        goal = ends["mezo"][1.0]
        for name, better in (("loss", -1), ("accuracy", 1)):
            shares = [share for share, end in ends["default"].items() if better * (end[name] - goal[name]) >= 0]
            reached[name] = min(shares, default=None)
    return {"ends": ends, "half_decades_within_a_point": wide, "share_to_mezo": reached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--beds", nargs="*", default=["trec_minilm", "sst2_minilm", "trec_prompted"])
    parser.add_argument("--methods", nargs="*", default=["mezo", "default", "lora", "full"])
    parser.add_argument("--budget", type=int, default=320_000, help="row-forwards")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each a process of one thread")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the weights that MeZO moves")
    parser.add_argument("--folder", type=Path, help="keeps the model tuned on prompts, for the next time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def say(text: str) -> None:
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    found = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        folder = options.folder or Path(scratch)
        if "trec_prompted" in options.beds and not (folder / "tuned" / "model").exists():
            tune_on_prompts(options.data, folder)
        for name in options.beds:
            place = (name, options.data, folder, options.device, options.dtype)
            found[name] = compare(place, options.methods, options.budget, options.seeds, pool, say)
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
