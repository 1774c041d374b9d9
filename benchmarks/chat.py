"""Chat on the embedded model: loss on assistant tokens before and after, and how often it stops by itself.

python benchmarks/chat.py CONVERSATIONS.jsonl [--rows 100] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tunefork.recipe import make_recipe
from tunefork.workflows import finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--rows", type=int, default=100, help="held-out conversations")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(
            {
                "task": {"name": "chat", "max_new_tokens": 128},
                "data": {
                    "train": str(arguments.conversations),
                    "test_fraction": 0.25,
                    "test_rows": arguments.rows,
                    "max_leaked": 1.0,
                    "max_cut": 1.0,
                },
                "evaluate": {"baselines": ["zero_shot"]},
                "out": f"{folder}/run",
            }
        )
        result = finetune(recipe).result
    before, after = result["baselines"]["zero_shot"], result["test"]
    figures = {
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "stopped_before": before.get("stopped"),
        "stopped_after": after.get("stopped"),
        "seconds": result["seconds"],
    }
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, figure in figures.items():
        print(f"{name:16} {figure}")


if __name__ == "__main__":
    main()
