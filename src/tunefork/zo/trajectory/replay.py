"""From a base and a trajectory to the trained parameters: steps done again without evaluating anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tunefork.zo.directions.base import Term
from tunefork.zo.trajectory.format import Record
from tunefork.zo.trajectory.log import Reader, Trajectory, atomic


class Replayable(Protocol):
    """What steps are done again on: the engine, at some step."""

    steps: int

    def catch_up(self, records: Sequence[tuple[np.ndarray, Sequence[Term]]]) -> None:
        """Applies the next steps' terms in order, many in one visit of each tensor."""
        ...


def replay(engine: Replayable, records: Iterable[Record], *, at_once: int = 1 << 16) -> None:
    """Brings `engine` from the step it is at to the last of `records`, bit for bit as training did.

    Records of steps that it has done already are passed over; `at_once` terms are applied in one sweep.
    Raises ValueError where a record is missing in between.
    """
    waiting: list[tuple[np.ndarray, Sequence[Term]]] = []
    count, step = 0, engine.steps
    for record in records:
        if record.step < step:
            continue
        if record.step > step:
            raise ValueError(
                f"Steps must be replayed in order. Received step {record.step} after {step} finished steps."
            )
        waiting.append((record.gradients, record.terms))
        count, step = count + len(record.terms), step + 1
        if count >= at_once:
            engine.catch_up(waiting)
            waiting, count = [], 0
    if waiting:
        engine.catch_up(waiting)


class Snapshot(NamedTuple):
    """The state after `step` finished steps."""

    step: int
    tensors: dict[str, torch.Tensor]


class Snapshots:
    """States of a run at some of its steps, which make its replay short.

    One safetensors file a state, with its step, the trajectory's identity and the SHA-256 of its tensors.

    Attributes:
        damaged: files that `newest` found not to be what was saved.
    """

    def __init__(self, folder: str | Path, trajectory: Reader) -> None:
        self.folder, self.trajectory = Path(folder), trajectory
        self.damaged: list[Path] = []

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], *, keep: int = 2) -> Path:
        """Writes the state after `step` steps, once those are on the disk too; leaves the newest `keep` files."""
        if isinstance(self.trajectory, Trajectory):
            self.trajectory.sync()
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        facts = {"trajectory": self.trajectory.identity, "step": str(step), "sha256": digest(held)}
        path = self.folder / f"step-{step:012}.safetensors"
        with atomic(path) as temporary:
            save_file(held, temporary, facts)
        for old in self._files()[keep:]:
            old.unlink()
        return path

    def newest(self, upto: int | None = None) -> Snapshot | None:
        """The newest state of this trajectory, after `upto` steps at most, that is still what was saved."""
        limit = self.trajectory.steps if upto is None else min(upto, self.trajectory.steps)
        for path in self._files():
            try:
                with safe_open(path, "pt") as file:
                    facts = file.metadata() or {}
                if facts.get("trajectory") != self.trajectory.identity or int(facts["step"]) > limit:
                    continue
                tensors = load_file(path)
            except (SafetensorError, OSError):
                self.damaged.append(path)
                continue
            if digest(tensors) == facts["sha256"]:
                return Snapshot(int(facts["step"]), tensors)
            self.damaged.append(path)
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, in hex, of tensors by name: names, dtypes, shapes and bytes. Also what a base model is known by."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
