"""One cell of a comparison, alone in its process: {"recipe", "baseline", "memory_limit"} as JSON in, figures out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunefork.errors import TuneforkError
from tunefork.evaluate.stored import write_predictions
from tunefork.recipe import dump_recipe, make_recipe
from tunefork.run import RunFolder
from tunefork.train.forecast import forecast
from tunefork.train.memory import PeakMeter
from tunefork.train.prepare import prepare
from tunefork.workflows.finetune import finetune


def trained_cell(recipe: Mapping[str, Any], memory_limit: int | None) -> dict[str, Any]:
    """A whole run, without baselines; in micro-batches whose forecast keeps to `memory_limit` bytes, if any does.

    A run that was interrupted goes on.
    """
    made = make_recipe(recipe)
    while memory_limit is not None:
        job = prepare(made)
        micro = int(job.recipe.train.micro_batch_size)
        if micro == 1 or forecast(job).memory_bytes <= memory_limit:
            break
        made = make_recipe({**recipe, "train": {**recipe["train"], "micro_batch_size": micro // 2}})
    begun = RunFolder(Path(str(made.out)), None)
    result = finetune(made, resume=begun.finished or bool(begun.checkpoint_steps())).result
    seconds = result["seconds"]["train"] + result["seconds"]["evaluate"]
    return {"metrics": result["test"], "seconds": seconds, "peak_memory_bytes": result["peak_memory_bytes"]["value"]}


def baseline_cell(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One baseline on the test rows."""
    job, started = prepare(make_recipe(recipe)), time.perf_counter()
    with PeakMeter(job.device) as memory:
        found = job.measure_baselines([name], job.asking())[name]
    with RunFolder.create(Path(str(job.recipe.out)), dump_recipe(job.recipe)) as run:
        write_predictions(run, "test", found.predictions)
    seconds = time.perf_counter() - started
    return {"metrics": dict(found.metrics), "seconds": seconds, "peak_memory_bytes": memory.value}


def main() -> int:
    spec = json.load(sys.stdin)
    try:
        if spec["baseline"] is not None:
            found = baseline_cell(spec["recipe"], spec["baseline"])
        else:
            found = trained_cell(spec["recipe"], spec["memory_limit"])
    except TuneforkError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
