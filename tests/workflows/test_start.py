"""The look at dev before the first step: the start may be the best there is, and the curve begins with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.scenes import put, reviews
from tests.stopping import StopAt
from tunefork import finetune
from tunefork.errors import Interrupted
from tunefork.export.exporting import export
from tunefork.recipe import make_recipe
from tunefork.train.forecast import forecast
from tunefork.train.prepare import prepare
from tunefork.workflows import replay

METHODS = ("backprop", "zo")


def recipe(model: Path, folder: Path, out: str, **train: Any) -> dict[str, Any]:
    """Rates at which all is unlearned at once, unless another is given."""
    rate = {"max_steps": 4, "evaluate_every": 2, "save_every": 1, "learning_rate": 0.99, "warmup": 0.0}
    return {
        "model": str(model),
        "task": {"name": "classification", "form": "head"},
        "adapter": {"name": "lora", "rank": 4} if train.get("method") != "zo" else "none",
        "data": {"train": str(put(folder / "rows.csv", reviews())), "dev_fraction": 0.25},
        "train": {**rate, **train},
        "evaluate": {"baselines": [], "bootstrap": 100},
        "out": str(folder / out),
        **({"zo": {"epsilon": 1e-3}, "seed": 3} if train.get("method") == "zo" else {}),
    }


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_gets_better_the_start_is_kept(method: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    done = finetune(recipe(tiny("llama"), tmp_path, "a", method=method))
    found = done.result["train"]
    assert [(look["step"], look["better"]) for look in found["looks"]] == [(0, True), (2, False), (4, False)]
    assert found["weights_from_step"] == 0
    assert found["notes"][-1].startswith("No look at dev was better than the one before training, so the weights are")
    changes = {name: tensor for name, tensor in weights(done.path).items() if "lora_B" in name}
    assert changes and not any(tensor.any() for tensor in changes.values())
    last = finetune(recipe(tiny("llama"), tmp_path, "b", method=method, keep_best=False))
    assert (last.result["train"]["weights_from_step"], last.result["train"]["notes"][-1:]) != (0, found["notes"][-1:])
    assert any(tensor.any() for name, tensor in weights(last.path).items() if "lora_B" in name)
    if method == "zo":
        again = replay(tiny("llama"), export(done.path, to="trajectory").path, tmp_path / "again")
        ours, theirs = weights(done.path), load_file(again.path / "adapter_model.safetensors")
        assert again.step == 0 and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_of_equals_the_trained_one_is_kept(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    found = finetune(recipe(tiny("llama"), tmp_path, "a", learning_rate=1e-9)).result["train"]
    assert [(look["step"], look["better"]) for look in found["looks"]] == [(0, True), (2, True), (4, False)]
    assert found["weights_from_step"] == 2 and not any("better than the one before" in note for note in found["notes"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_it_is_still_the_start(stop: int, method: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """After one step there is the start's checkpoint alone."""
    whole = finetune(recipe(tiny("llama"), tmp_path, "whole", method=method, save_every=2))
    stopped = recipe(tiny("llama"), tmp_path, "stopped", method=method, save_every=2)
    with pytest.raises(Interrupted):
        finetune(stopped, listener=StopAt(stop))
    done = finetune({"task": "classification", "out": stopped["out"]}, resume=True)
    for found in (done, whole):  # how a step's losses are evaluated depends on the step
        found.result["train"]["notes"] = found.result["train"]["notes"][-1:]
    assert done.result["train"] == whole.result["train"]
    ours, theirs = weights(whole.path), weights(done.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_time_is_forecast_for_the_looks_there_are(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """At the start, after every second step, and after the last."""

    def looking(**train: Any) -> float:
        found = forecast(prepare(make_recipe(recipe(tiny("llama"), tmp_path, "a", **train))))
        assert found.seconds is not None and found.step_seconds is not None
        return (found.seconds - found.step_seconds) / found.step_seconds

    assert looking(max_steps=5) / looking(max_steps=5, evaluate_every=5) == pytest.approx(4 / 2, rel=0.3)
