"""`python -m tests.recovery.training_driver`: trains in a forked child, kills it at random instants, resumes, again.

Reads {"recipe", "kills", "seed", "longest"} from its input; prints how many children were killed before one finished.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tunefork.errors import RunError
from tunefork.recipe import make_recipe
from tunefork.workflows import finetune


def begin_or_go_on(recipe: dict[str, Any]) -> None:
    """Resumes where there is a run, otherwise begins one, as a person would after a crash."""
    wanted = make_recipe(recipe)
    folder = Path(recipe["out"])
    if (folder / "recipe.yaml").exists() and (folder / "log.jsonl").exists():
        finetune(wanted, resume=True)
    else:
        finetune(wanted)


def main() -> None:
    torch.set_num_threads(1)
    order = json.load(sys.stdin)
    chance = random.Random(order["seed"])
    killed = 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                begin_or_go_on(order["recipe"])
            except RunError as error:
                sys.stderr.write(f"{error}\n")
                os._exit(3)
            os._exit(0)
        if killed < order["kills"]:
            time.sleep(chance.uniform(0.0, order["longest"]))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status) != 0:
            sys.exit(f"a child failed with {os.WEXITSTATUS(status)} after {killed} kills")
        else:
            break
    print(json.dumps({"killed": killed}))


if __name__ == "__main__":
    main()
