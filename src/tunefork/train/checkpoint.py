"""Checkpoints: written whole or not at all, verified before they are used, the newest good one first."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tunefork.errors import RecipeError, RunError, UnsupportedError
from tunefork.files import folder_damage, make_folder, remove_folder, write_folder
from tunefork.run import RunFolder

_STATE = "state.json"
_SUFFIX = ".safetensors"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PACKAGES = ("tunefork", "torch", "transformers", "peft", "numpy", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint read back, bit for bit, with tensors on the CPU."""

    path: Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]  # group -> name -> tensor
    state: dict[str, Any]
    skipped: tuple[tuple[Path, str], ...] = ()  # newer checkpoints that are damaged, newest first, and why


def save_checkpoint(
    run: RunFolder,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Writes the checkpoint of `step`, then removes all but the newest `keep` and those of the steps in `protect`.

    `tensors` holds groups (weights, method, ...) of named tensors on any device, each group a file; `state` is what
    JSON can hold. Killed at any instant, the run has all its old checkpoints or the new one too. A checkpoint of a
    later step can only be a damaged one that `load_newest` skipped, and goes as well.
    Raises TrainingError when the disk is full and RunError when the folder cannot be written.
    """
    run.require_writable()
    if keep < 1:
        raise RecipeError(f"`train.keep_checkpoints` must be at least 1. Received {keep}. Try 2.")
    text = json.dumps({"step": step, "state": state}, indent=1)
    contents: dict[str, Any] = {f"{group}{_SUFFIX}": _safetensors(named) for group, named in tensors.items()}
    run.sync_log()
    make_folder(run.checkpoints_path)
    path = run.checkpoint_path(step)
    write_folder(path, {**contents, _STATE: [text.encode()]})
    steps = run.checkpoint_steps()
    kept = {*[s for s in steps if s <= step][-keep:], *protect}
    for other in steps:
        if other not in kept:
            remove_folder(run.checkpoint_path(other))
    return path


def load_newest(run: RunFolder) -> Loaded | None:
    """The newest checkpoint that is exactly what was written, with those it had to skip; None when there are none.

    Raises RunError when there are checkpoints and every one is damaged.
    """
    skipped: list[tuple[Path, str]] = []
    for step in reversed(run.checkpoint_steps()):
        loaded = _load(run.checkpoint_path(step), step)
        if isinstance(loaded, Loaded):
            return replace(loaded, skipped=tuple(skipped))
        skipped.append((run.checkpoint_path(step), loaded))
    if skipped:
        whys = "; ".join(f"{path.name}: {why}" for path, why in skipped)
        raise RunError(
            f"A run to go on with must have a good checkpoint. All in {run.checkpoints_path} are damaged ({whys}). "
            "Try a copy of the folder from a backup, or a new run."
        )
    return None


def load_step(run: RunFolder, step: int) -> Loaded:
    """The checkpoint of one step. Raises RunError when it is missing or damaged."""
    loaded = _load(run.checkpoint_path(step), step)
    if isinstance(loaded, Loaded):
        return loaded
    others = ", ".join(str(s) for s in run.checkpoint_steps() if s != step) or "none"
    raise RunError(
        f"The checkpoint of step {step} must be whole. Received {run.checkpoint_path(step)}: {loaded}. "
        f"Try another step (there: {others})."
    )


def environment(device: torch.device, dtype: str) -> dict[str, str | int | None]:
    """What the last bits of a result depend on besides recipe and data: versions, device, threads, number format."""
    return {
        **{package: installed(package) for package in _PACKAGES},
        "device": _device_name(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def environment_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is not as it was, one sentence each; empty when a resumed run can be bitwise equal."""
    return [
        f"`{name}` was {_said(old.get(name))} when the checkpoint was written and is {_said(new.get(name))} now: "
        "the run may differ in the last bits from one that was never stopped."
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _load(path: Path, step: int) -> Loaded | str:
    """The checkpoint in `path`, or why it cannot be used."""
    if not path.is_dir():
        return "there is no such folder"
    if damage := folder_damage(path):
        return damage
    try:
        content = json.loads((path / _STATE).read_bytes())
        files = sorted(path.glob(f"*{_SUFFIX}"))
        tensors = {file.name.removesuffix(_SUFFIX): load_file(file) for file in files}
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if content["step"] != step:
        return f"it was written as step {content['step']}"
    return Loaded(path, step, tensors, content["state"])


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in chunks, one tensor at a time, so that no second copy of all of them is in memory.

    Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, the data without gaps).
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise UnsupportedError(
                f"A checkpoint can hold float, bfloat16, integer and bool tensors. Received {tensor.dtype} ({name}). "
                "Try converting it first."
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


@functools.cache
def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({_processor()})"


@functools.cache
def _processor() -> str:
    """Name of the CPU: Linux says it in /proc only."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _said(value: Any) -> str:
    return "not there" if value is None else str(value)
