"""Every method x adapter x task x model kind learns 32 rows by heart, or is refused with a sentence of what to use.

Where little can be learned in so few steps less is asked: a head or a prefix over random features lowers the loss on
them, zo does not raise it. Each then reloads to identical predictions and resumes bit for bit. `make test` runs a set
of cells in which every pair of values occurs; `make test-all` runs all of them.

Masked models train with dropout over 32 features and few tokens, and need smaller steps and more of them: without
dropout all rows are learned at the others' rate.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.stopping import StopAt
from tests.tiny import CAUSAL, KINDS, MASKED, adapter_section
from tunefork.data import load_splits
from tunefork.errors import Interrupted, TuneforkError
from tunefork.evaluate.harness import predict_examples
from tunefork.evaluate.stored import read_predictions
from tunefork.evaluate.trained import load_trained
from tunefork.methods import list_methods, method_info
from tunefork.recipe import Recipe, make_recipe
from tunefork.run import RunFolder
from tunefork.tasks import Prediction, build_examples
from tunefork.workflows import evaluate, finetune

WORDS = ("box", "screen", "film", "report", "keys", "door", "service", "noon")
ADAPTERS = ("none", "lora", "qlora", "dora", "prefix", "head")
TASKS = ("classification", "classification/head", "scoring", "choice", "generation", "chat")
RATE_AND_STEPS = {"none": (3e-3, 120), "prefix": (5e-2, 200)}
OTHERS, OTHERS_MASKED = (1e-2, 200), (4e-3, 500)


class Cell(NamedTuple):
    method: str
    adapter: str
    task: str
    kind: str


def cells() -> list[Cell]:
    methods = [info.name for info in list_methods() if info.adapters]
    return [Cell(*values) for values in itertools.product(methods, ADAPTERS, TASKS, KINDS)]


def rate_and_steps(cell: Cell) -> tuple[float, int]:
    """What lets the cell's rows be learned with room to spare, on more than one seed."""
    slow = cell.kind in MASKED and cell.adapter in ("lora", "qlora", "dora") and cell.method == "backprop"
    return RATE_AND_STEPS.get(cell.adapter, OTHERS_MASKED if slow else OTHERS)


def pairwise(everything: list[Cell]) -> list[Cell]:
    """Cells, chosen greedily and always the same, that together hold every pair of values that occurs."""

    def pairs(cell: Cell) -> set[tuple[int, str, int, str]]:
        return {(i, cell[i], j, cell[j]) for i, j in itertools.combinations(range(len(cell)), 2)}

    missing = set().union(*(pairs(cell) for cell in everything))
    chosen: list[Cell] = []
    while missing:
        best = max(everything, key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


QUICK = pairwise(cells())


def parameters() -> Iterator[Any]:
    for cell in cells():
        marks = () if cell in QUICK else (pytest.mark.slow,)
        yield pytest.param(cell, marks=marks, id="-".join(cell).replace("/", "_"))


def rows(task: str, frozen: bool) -> list[dict[str, Any]]:
    """32 rows to learn by heart: nothing in them can be guessed. Under `frozen` random features the text tells."""
    found: list[dict[str, Any]] = []
    for i in range(32):
        text = f"{WORDS[i % 8]} {WORDS[i // 8]} {WORDS[(i * 3 + i // 8) % 8]} {i}"
        label = (i * 7 + i // 3) % 2
        text = f"{('terrible', 'great')[label]} " * 4 + text if frozen else text
        if task == "chat":
            reply = WORDS[(i * 5 + 1) % 8]
            found.append({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]})
        elif task == "generation":
            found.append({"prompt": text, "completion": WORDS[(i * 5 + 1) % 8]})
        elif task == "choice":
            found.append({"question": text, "choices": ["good", "bad"], "label": label})
        else:
            found.append({"text": text, "label": str(label)})
    return found


def recipe(cell: Cell, model: Path, folder: Path, out: str, **train: Any) -> Recipe:
    kind, _, form = cell.task.partition("/")
    rate, steps = rate_and_steps(cell)
    file = folder / f"{kind}.jsonl"
    if not file.exists():
        frozen = cell.adapter in ("head", "prefix")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(kind, frozen)))
    return make_recipe(
        {
            "model": {"name": str(model), "device": "cpu"},
            "task": {"name": kind, "form": form or "auto"},
            "adapter": adapter_section(cell.adapter, cell.method, rank=8, prefix_tokens=16),
            "data": {
                "train": str(file),
                "test_fraction": 0,
                "dev_fraction": 0.04,
                "labels": {"0": "bad", "1": "good"} if kind == "classification" else None,
                "max_leaked": 1,
            },
            "train": {
                "method": cell.method,
                "learning_rate": rate if cell.method != "zo" else "auto",
                "batch_size": 2 if cell.method == "zo" else 16,
                "micro_batch_size": 2 if cell.method == "zo" else 16,
                "schedule": "linear",
                "warmup": 0.05,
                "max_steps": steps,
                "evaluate_every": 1000,
                "save_every": 20,
                "keep_best": False,
                **train,
            },
            "evaluate": {"baselines": []},
            "out": str(folder / out),
        }
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "model").glob("*.safetensors"))
    assert files
    return {f"{f.name}/{name}": tensor for f in files for name, tensor in load_file(f).items()}


def alike(found: Sequence[Prediction], expected: Sequence[Prediction]) -> bool:
    """Equal; on a GPU, whose products depend on where in memory a model lies, with losses that round alike."""
    if not torch.cuda.is_available():
        return found == expected

    def numbers(p: Prediction) -> list[float]:
        return [*p.probabilities, *([] if p.loss is None else [p.loss])]

    said = [[replace(p, probabilities=(), loss=None) for p in some] for some in (found, expected)]
    pairs = zip(found, expected, strict=True)
    return said[0] == said[1] and all(numbers(a) == pytest.approx(numbers(b), rel=1e-5) for a, b in pairs)


@pytest.mark.parametrize("cell", parameters())
def test_cell(cell: Cell, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny(cell.kind)
    try:
        done = finetune(recipe(cell, model, tmp_path, "whole"))
    except TuneforkError as refused:
        assert refused.exit_code == 2, refused
        assert "Try" in str(refused)
        assert "Received" in str(refused)
        assert not (tmp_path / "whole").exists(), "a refused run writes nothing"
        assert not must_work(cell), refused
        return

    kind = cell.task.partition("/")[0]
    seen = evaluate(done.path, tmp_path / f"{kind}.jsonl")
    log = RunFolder.open(done.path, write=False).read_log()
    losses = [entry["loss"] for entry in log if entry["kind"] == "step"]
    if cell.method == "zo":  # from so few losses nothing is learned by heart, and a head starts at its best, the probe
        epoch = done.result["steps_per_epoch"]
        several, whole = 3 * epoch, len(losses) // epoch * epoch  # of the same rows: two at a time differ by more
        assert sum(losses[whole - several : whole]) < 1.02 * sum(losses[:several])
    elif cell.adapter in ("head", "prefix"):  # little can be read from, or put into, a random frozen model
        assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    else:
        learned = len(seen.predictions) - 1  # one row went to dev
        assert right(done.path, seen.predictions, tmp_path / f"{kind}.jsonl") >= 0.9 * learned

    again = evaluate(done.path, tmp_path / f"{kind}.jsonl")
    assert alike(again.predictions, seen.predictions), "a reloaded model says the same"

    part = recipe(cell, model, tmp_path, "part")
    with pytest.raises(Interrupted):
        finetune(part, listener=StopAt(27))
    resumed = finetune(part, resume=True)
    whole, other = weights(done.path), weights(resumed.path)
    assert whole.keys() == other.keys()
    assert all(torch.equal(whole[name], other[name]) for name in whole), "a resumed run ends with the same bits"


def right(run: Path, predictions: Sequence[Prediction], file: Path) -> int:
    """How many rows are answered right; what is said counts: no logit is large under a frozen random output."""
    if predictions[0].index is not None:
        return sum(p.index == p.gold_index for p in predictions)
    trained = load_trained(run, "cpu")
    splits, _ = load_splits(trained.data.model_copy(update={"test": str(file)}), 0, None)
    examples, _ = build_examples(trained.task, splits.test, trained.data, labelled=True)
    with_text = predict_examples(trained.model, trained.asking(4096), examples, generated=True)
    return sum(p.predicted == p.references[0].strip() for p in with_text)


def must_work(cell: Cell) -> bool:
    """The cells that a user counts on; the battery may not pass by refusing them."""
    if cell.adapter not in method_info(cell.method).adapters:
        return False
    head = cell.task == "classification/head"
    if cell.adapter == "head":
        return head
    if cell.kind in CAUSAL:
        return cell.adapter in ("none", "lora", "qlora", "dora") or not head
    return cell.adapter in ("none", "lora", "dora") and cell.task in ("classification", "classification/head")


def test_pairwise_cells_hold_every_pair() -> None:
    for i, j in itertools.combinations(range(4), 2):
        assert {(c[i], c[j]) for c in QUICK} == {(c[i], c[j]) for c in cells()}


def test_predictions_on_disk_read_back_equal(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    cell = Cell("backprop", "lora", "classification", "llama")
    done = finetune(
        recipe(cell, tiny("llama"), tmp_path, "run", max_steps=3).model_copy(
            update={"data": recipe(cell, tiny("llama"), tmp_path, "run").data.model_copy(update={"test_fraction": 0.3})}
        )
    )
    kept = read_predictions(done.path / "predictions" / "test.jsonl")
    assert len(kept) == done.result["data"]["counts"]["test"]["rows"]
    assert load_trained(done.path).task.labels == ("bad", "good")
