"""What the recovery tests kill: runs with small checkpoints, and ways to go on with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tunefork.errors import MissingFileError, RunError
from tunefork.files import staged_folder
from tunefork.run import RunFolder
from tunefork.train.checkpoint import Loaded, load_newest, save_checkpoint

Tensors = dict[str, dict[str, torch.Tensor]]


def tensors(step: int) -> Tensors:
    """Small weights and method state that no two steps share, in several number formats."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {
            "a.weight": torch.randn(3, 4, generator=generator).t(),  # not contiguous
            "b.bias": torch.randn(5, generator=generator).to(torch.bfloat16),
        },
        "method": {"step": torch.tensor(step), "seen": torch.tensor([True, False]), "none": torch.zeros(0, 7)},
    }


def state(step: int) -> dict[str, object]:
    return {"progress": {"step": step, "best_value": 0.1 * step, "curve": [float("inf"), 1e-300]}}


def same(left: Tensors, right: Tensors) -> bool:
    """Bitwise, with shapes, number formats and names."""
    if {g: set(t) for g, t in left.items()} != {g: set(t) for g, t in right.items()}:
        return False
    pairs = [(tensor, right[group][name]) for group, named in left.items() for name, tensor in named.items()]
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def is_checkpoint(loaded: Loaded | None, step: int, seed: int) -> bool:
    return (
        loaded is not None
        and loaded.step == step
        and same(loaded.tensors, tensors(seed))
        and loaded.state == state(seed)
    )


def make_run(path: Path, steps: tuple[int, ...]) -> Path:
    """A run with a good checkpoint at each of `steps`."""
    with RunFolder.create(path, "task: sst2\n") as run:
        for step in steps:
            run.append_log(step, "step", {"loss": 1 / step})
            save_checkpoint(run, step, tensors(step), state(step), keep=100)
    return path


def add_leftovers(path: Path) -> None:
    """What an earlier kill may have left: the next writer must cope with it."""
    trash = path / "checkpoints" / ".trash-step-00000003"
    shutil.copytree(path / "checkpoints" / "step-00000005", trash)
    (trash / "state.json").unlink()
    (path / ".tmp-99-result.json").write_text("{")


def save_next(path: Path) -> None:
    """Saves step 20 into a run with steps 5 and 10; 10 is pruned and 5 is protected."""
    with RunFolder.open(path, write=True) as run:
        run.append_log(20, "step", {"loss": 0.05})
        save_checkpoint(run, 20, tensors(20), state(20), keep=1, protect={5})


def save_again(path: Path) -> None:
    """Saves step 20, with other content, into a run that has it."""
    with RunFolder.open(path, write=True) as run:
        save_checkpoint(run, 20, tensors(21), state(21), keep=1, protect={5})


def live(path: Path) -> None:
    """A whole small run from nothing, or from wherever it was killed, to its result."""
    try:
        run = RunFolder.open(path, write=True)
    except (MissingFileError, RunError):
        run = RunFolder.create(path, "task: sst2\n")
    with run:
        loaded = load_newest(run)
        step = loaded.step if loaded else 0
        weights = loaded.tensors["weights"]["w"].clone() if loaded else torch.zeros(4)
        run.truncate_log(step)
        while step < 3:
            weights = torch.sin(weights + step)
            step += 1
            run.append_log(step, "step", {"loss": float(weights.sum())})
            save_checkpoint(run, step, {"weights": {"w": weights}}, {"step": step}, keep=1)
        with staged_folder(run.model_path) as folder:
            (folder / "model.safetensors").write_bytes(weights.numpy().tobytes())
            (folder / "assets").mkdir()
            (folder / "assets" / "card.md").write_text("# card\n")
        run.write_result({"steps": step})
