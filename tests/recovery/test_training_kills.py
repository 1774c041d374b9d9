"""Real training, killed with SIGKILL at random instants and resumed each time, ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.stopping import StopAt
from tunefork.errors import Interrupted
from tunefork.export.exporting import export
from tunefork.recipe import make_recipe
from tunefork.run import RunFolder
from tunefork.workflows import finetune, replay

ROOT = Path(__file__).resolve().parents[2]


METHODS: dict[str, dict[str, Any]] = {
    "backprop": {"adapter": {"name": "lora", "rank": 4, "dropout": 0.1}},
    "zo": {"adapter": "none", "zo": {"epsilon": 1e-3}, "task": {"name": "classification", "form": "head"}},
}


def recipe(model: Path, folder: Path, out: str, method: str = "backprop") -> dict[str, Any]:
    file = folder / "rows.jsonl"
    if not file.exists():
        rows = [{"text": f"great box {i}" if i % 2 else f"terrible film {i}", "label": i % 2} for i in range(60)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": str(model), "device": "cpu"},
        "task": "classification",
        "data": {"train": str(file), "max_leaked": 1.0},
        "train": {"max_steps": 24, "learning_rate": 1e-3, "save_every": 3, "evaluate_every": 4, "batch_size": 4}
        | {"method": method},
        "evaluate": {"baselines": []},
        "out": str(folder / out),
        **METHODS[method],
    }


def figures(folder: Path) -> dict[str, Any]:
    """Everything a finished run says, without what it cost and the folder's name."""
    found = RunFolder.open(folder, write=False).read_result()
    del found["seconds"], found["peak_memory_bytes"], found["forwards"], found["recipe"]["out"]
    for notes in found["baseline_notes"].values():
        del notes["seconds"]
    predictions = {path.name: path.read_text() for path in (folder / "predictions").iterdir()}
    return {"result": found, "model": (folder / "model" / "tunefork.json").read_text(), "predictions": predictions}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_says_what_a_whole_one_says(method: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    def asked(out: str) -> dict[str, Any]:
        found = recipe(tiny("llama"), tmp_path, out, method)
        found["train"] = {"method": method, "max_steps": 6, "save_every": 2, "evaluate_every": 3}
        found["evaluate"] = {"baselines": ["probe"] if method == "zo" else ["in_context"], "bootstrap": 100}
        return found

    whole = finetune(asked("whole"))
    with pytest.raises(Interrupted):
        finetune(asked("stopped"), listener=StopAt(5))
    resumed = finetune({"task": "classification", "out": str(tmp_path / "stopped")}, resume=True)
    assert figures(resumed.path) == figures(whole.path)
    copied = make_recipe({**whole.result["recipe"], "out": str(tmp_path / "copied")})
    kept, again = figures(whole.path), figures(finetune(copied).path)
    assert again["result"].pop("reasons") != kept["result"].pop("reasons")  # what was automatic is given now
    assert again == kept


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_instants(method: str, kills: int, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    whole = finetune(make_recipe(recipe(tiny("llama"), tmp_path, "whole", method)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.recovery.training_driver"],
        input=json.dumps(
            {"recipe": recipe(tiny("llama"), tmp_path, "killed", method), "kills": kills, "seed": kills, "longest": 0.9}
        ),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["killed"] > 0
    ours = load_file(whole.path / "model" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "killed" / "model" / "adapter_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "killed" / "report.html").exists()
    assert figures(tmp_path / "killed") == figures(whole.path)
    for name in ("step", "look"):
        logs = [
            [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines() if f'"kind": "{name}"' in line]
            for path in (whole.path, tmp_path / "killed")
        ]
        told = [[(e["step"], e["loss"] if name == "step" else e["value"]) for e in log] for log in logs]
        assert told[0] == told[1], "every step and look is in the log once, with the same figure"
    if method == "zo":
        assert (tmp_path / "killed" / "trajectory").read_bytes() == (whole.path / "trajectory").read_bytes()
        again = replay(tiny("llama"), export(tmp_path / "killed", to="trajectory").path, tmp_path / "again")
        theirs = load_file(again.path / "adapter_model.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
