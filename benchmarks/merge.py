"""How far a merged model is from the trained one: LoRA and QLoRA, in fp32 and bf16, and the ways that go wrong.

    python benchmarks/merge.py [--steps 60] [--json]

The embedded model learns the embedded customer feedback; then |merged - trained| / |trained - base| is taken over the
logits on 64 held-out rows (what `tunefork export` proves, and refuses above 0.05). An untouched base has 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from tunefork.errors import ExportError
from tunefork.evaluate.trained import load_trained
from tunefork.export.exporting import export
from tunefork.export.proof import LIMIT, held_out, in_fp32, read_logits
from tunefork.models import load_base, quiet
from tunefork.recipe import load_recipe, make_recipe
from tunefork.workflows import finetune

from peft import PeftModel  # isort: skip  # after tunefork, which keeps bitsandbytes from fetching a kernel


def trained_run(folder: Path, adapter: str, dtype: str, steps: int) -> Path:
    """A finished run in `folder`."""
    feedback = files("tunefork") / "assets" / "feedback"
    recipe = {
        "model": {"name": "embedded", "dtype": dtype},
        "task": "classification",
        "adapter": adapter,
        "data": {split: str(feedback / f"{split}.csv") for split in ("train", "dev", "test")},
        "train": {"max_steps": steps},
        "evaluate": {"baselines": []},
        "out": str(folder / f"{adapter}-{dtype}"),
    }
    return finetune(make_recipe(recipe)).path


def exported(run: Path, dtype: str) -> dict[str, Any]:
    """The proof of an export, or why it was refused."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            proof = export(run, out=Path(folder) / "merged", dtype=dtype).proof
        except ExportError as error:
            return {"ratio": None, "passed": False, "why": str(error)}
    assert proof is not None
    names = ("ratio", "ratio_in_own_arithmetic", "passed", "ties", "change")
    return {name: proof[name] for name in names}


def ratio(run: Path, wrong: Callable[[Any], torch.nn.Module]) -> dict[str, Any]:
    """The same figure for another way from a trained model to one without an adapter."""
    trained = load_trained(run)
    rows = held_out(load_recipe(run / "recipe.yaml"), trained.task, trained.renderer)
    in_fp32(trained.model)
    right = read_logits(trained.model, rows, trained.device)
    assert isinstance(trained.model, PeftModel)
    with trained.model.disable_adapter():
        base = read_logits(trained.model, rows, trained.device)
    other = read_logits(in_fp32(wrong(load_trained(run))), rows, trained.device)
    value = float((other - right).norm() / (right - base).norm())
    return {"ratio": value, "passed": value <= LIMIT}


def into_original(dtype: torch.dtype, run: Path) -> Callable[[Any], torch.nn.Module]:
    """The adapter merged into the base's original weights, saved in `dtype`."""

    def merge(trained: Any) -> torch.nn.Module:
        base: Any = load_base(trained.facts, trained.task.form, trained.task.labels, trained.device, torch.float32)
        with quiet():
            return PeftModel.from_pretrained(base, str(run / "model")).merge_and_unload().to(dtype)

    return merge


def in_four_bits(trained: Any) -> torch.nn.Module:
    """The adapter merged into the NF4 weights, which are quantised again."""
    with quiet():
        return trained.model.merge_and_unload()


def untouched(trained: Any) -> torch.nn.Module:
    """The model with the adapter switched off."""
    for name, parameter in trained.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return trained.model


def measured(folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """A row of the table after another."""
    for adapter in ("lora", "qlora"):
        for dtype in ("fp32", "bf16"):
            run = trained_run(folder, adapter, dtype, steps)
            row = {"adapter": adapter, "trained in": dtype}
            for kept in ("fp32", "bf16"):
                yield {**row, "merged": f"tunefork export, {kept}", **exported(run, kept)}
            yield {**row, "merged": "nothing: the base alone", **ratio(run, untouched)}
            if adapter == "qlora":
                for kept, format_ in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                    wrong = ratio(run, into_original(format_, run))
                    yield {**row, "merged": f"into the original weights, {kept}", **wrong}
                yield {**row, "merged": "in 4 bits, quantised again", **ratio(run, in_four_bits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="machine-readable results alone on stdout")
    options = parser.parse_args()
    screen = sys.stderr if options.json else sys.stdout
    found = []
    print(f"{'adapter':8} {'trained in':11} {'merged':33} {'ratio':>9} {'in its own format':>18}  passes", file=screen)
    with tempfile.TemporaryDirectory() as folder:
        for row in measured(Path(folder), options.steps):
            found.append(row)
            own = row.get("ratio_in_own_arithmetic")
            print(
                f"{row['adapter']:8} {row['trained in']:11} {row['merged']:33} "
                f"{'refused' if row['ratio'] is None else format(row['ratio'], '9.2g'):>9} "
                f"{'' if own is None else format(own, '.2g'):>18}  {'yes' if row['passed'] else 'no'}",
                file=screen,
                flush=True,
            )
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
