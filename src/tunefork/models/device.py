"""Where a model computes and in which number format, with the reason for each automatic choice."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Literal

import torch

from tunefork.errors import RecipeError, UnsupportedError
from tunefork.recipe.schema import ModelSection

DtypeName = Literal["fp32", "bf16", "fp16"]

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """`fp32`, `bf16` or `fp16` as torch calls it."""
    if name not in _DTYPES:
        raise RecipeError(f"`model.dtype` must be one of {', '.join(_DTYPES)}. Received {name!r}. Try fp32.")
    return _DTYPES[name]


def choose_device(section: ModelSection) -> tuple[torch.device, str]:
    """The device and why. Raises UnsupportedError when the one asked for is not there, or when several processes train.

    One process uses one device; of several GPUs it takes the first visible one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError(
            f"Training runs on one device in one process for now. Received WORLD_SIZE={os.environ['WORLD_SIZE']}. "
            "Try it without torchrun, and CUDA_VISIBLE_DEVICES to say which GPU."
        )
    asked = section.device
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    missing = (asked == "cuda" and not cuda) or (asked == "mps" and not mps)
    if missing:
        raise UnsupportedError(
            f"`model.device` must be a device this machine and this PyTorch ({torch.__version__}) have. "
            f"Received {asked}, which was not found. Try --device auto or --device cpu."
        )
    if asked == "cuda" or (asked == "auto" and cuda):
        return torch.device("cuda", 0), f"{_asked(asked, 'a GPU was found')}{_others()}"
    if asked == "mps" or (asked == "auto" and mps):
        return torch.device("mps"), _asked(asked, "Apple's GPU was found")
    return torch.device("cpu"), _asked(asked, "no accelerator was found")


def choose_dtype(section: ModelSection, device: torch.device) -> tuple[DtypeName, str]:
    """The number format activations and frozen weights are in, and why. Trained weights are fp32 in any case."""
    if section.dtype != "auto":
        return section.dtype, "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "half the memory of fp32, its range, and this GPU computes in it"
        return "fp16", "half the memory of fp32; this GPU does not compute in bf16"
    if device.type == "mps":
        return "fp32", "exact; 16 bit on Apple's GPU must be asked for"
    return "fp32", "exact, and on most CPUs no slower than 16 bit"


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Where a model loaded for `dtype` computes in it: every forward pass, in training and after, runs inside."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _asked(asked: str, otherwise: str) -> str:
    return otherwise if asked == "auto" else "as asked"


def _others() -> str:
    count = torch.cuda.device_count()
    return f"; the first of {count}, training on several at once is not supported yet" if count > 1 else ""
