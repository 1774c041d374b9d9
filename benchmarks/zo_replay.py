"""How long it takes to do the steps of a trajectory again, on matrices of real models with random weights.

    python benchmarks/zo_replay.py [--json] [--threads N] [--steps 20000] [--queries 8] [--only minilm/low_rank ...]

`open` reads the file and its checksums; `replay` applies all its directions. Dense directions are applied for a
hundredth of the steps, and `replay` is a hundred times that: their time is proportional to steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig

from tunefork.zo import ZO, Reader
from tunefork.zo.directions.base import Term

SHARE = {"low_rank": 1, "rademacher": 100}


def models() -> dict[str, torch.nn.Module]:
    tiny = AutoConfig.from_pretrained(str(files("tunefork") / "assets" / "fork-tiny"))
    mini = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return {"fork-tiny": AutoModelForCausalLM.from_config(tiny), "minilm": AutoModel.from_config(mini)}


def write(path: Path, model: torch.nn.Module, steps: int, queries: int, **options: Any) -> None:
    """A trajectory as a run writes it, with made-up coefficients."""
    draws = np.random.Generator(np.random.PCG64(0))
    with ZO(model, queries=queries, trajectory=path, **options) as opt:
        assert opt.trajectory is not None
        for step in range(steps):
            gradients = draws.standard_normal(queries).astype(np.float32)
            terms = [Term(step, q, float(np.float32(-1e-5 * g))) for q, g in enumerate(gradients)]
            opt.trajectory.append(0.5, gradients, terms)


def measure(model: torch.nn.Module, direction: str, steps: int, queries: int) -> dict[str, Any]:
    share = SHARE[direction]
    options: dict[str, Any] = {"direction": direction, "train": "blocks"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trajectory"
        write(path, model, steps, queries, **options)
        started = time.perf_counter()
        reader = Reader(path)
        opened = time.perf_counter() - started
        ZO.from_trajectory(copy.deepcopy(model), reader, 1).detach()  # kernels are compiled
        started = time.perf_counter()
        opt = ZO.from_trajectory(model, reader, steps // share)
        took = (time.perf_counter() - started) * share
        opt.detach()
        trained = sum(site.parameter.numel() for site in opt.sites)
        outputs = sum(site.shape[0] for site in opt.sites)
        touched = outputs * opt.options.rank if direction == "low_rank" else trained
    return {
        "direction": direction,
        "steps": steps,
        "queries": queries,
        "parameters": trained,
        "file_bytes": reader.header.size(1) * steps,
        "open_seconds": opened,
        "replay_seconds": took,
        "numbers_a_direction": touched,
        "additions_a_second": touched * steps * queries / took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL/DIRECTION")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {
        f"{name}/{direction}": measure(model, direction, args.steps, args.queries)
        for name, model in models().items()
        for direction in SHARE
        if not args.only or f"{name}/{direction}" in args.only
    }
    if args.json:
        json.dump(found, sys.stdout, indent=2)
        return
    for name, row in found.items():
        print(
            f"{name:22} {row['file_bytes'] / 1e6:6.2f} MB  open {row['open_seconds']:6.2f} s  "
            f"replay {row['replay_seconds']:9.1f} s  {row['additions_a_second'] / 1e9:5.2f} G additions/s"
        )


if __name__ == "__main__":
    main()
