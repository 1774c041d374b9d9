"""Is this machine ready? Versions, devices, memory, extras, and the main path tried once for real."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import torch

from tunefork import __version__
from tunefork.errors import TuneforkError
from tunefork.recipe import make_recipe
from tunefork.train.checkpoint import installed
from tunefork.workflows.finetune import finetune

PACKAGES = ("torch", "transformers", "peft", "safetensors", "pydantic", "scikit-learn")
FOR_DEVELOPERS = ("test", "dev")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's findings."""

    name: str
    ok: bool | None  # None: an extra that is not installed, which is no fault
    says: str


def doctor() -> list[Check]:
    """Looks at versions, devices, memory and disk, then trains the embedded model for two steps for real."""
    checks = [Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}")]
    checks.append(Check("tunefork", True, __version__))
    checks += [Check(name, True, str(installed(name))) for name in PACKAGES]
    for extra, packages in extras(metadata.requires("tunefork") or ()).items():
        missing = [package for package in packages if installed(package) is None]
        says = ", ".join(f"{package} {installed(package)}" for package in packages)
        if missing:
            says = f"without {', '.join(missing)}; pip install 'tunefork[{extra}]' adds it"
        checks.append(Check(f"extra {extra}", None if missing else True, says))
    checks.append(Check("device", True, _device()))
    checks.append(Check("threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} cores"))
    checks.append(Check("memory", True, _memory()))
    free = shutil.disk_usage(Path.cwd()).free
    checks.append(Check("disk", free > 2**30, f"{free / 2**30:.1f} GiB free here"))
    checks.append(_tried())
    return checks


def extras(requirements: Iterable[str]) -> dict[str, list[str]]:
    """Extra -> the packages it adds, from a distribution's requirements; those for developers left out."""
    found: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if match and match[2] not in FOR_DEVELOPERS:
            found.setdefault(match[2], []).append(match[1])
    return found


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"CUDA: {', '.join(names)}" + ("; the first is used" if len(names) > 1 else "")
    if torch.backends.mps.is_available():
        return "Apple MPS"
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}); no accelerator found"


def _memory() -> str:
    if sys.platform == "win32":
        return "not looked up on Windows"
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.1f} GiB"


def _tried() -> Check:
    feedback = str(files("tunefork") / "assets" / "feedback" / "train.csv")
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(
            {
                "task": "classification",
                "data": {"train": feedback, "train_rows": 64, "dev_rows": 16, "test_rows": 16},
                "train": {"max_steps": 2},
                "evaluate": {"baselines": ["majority"]},
                "out": f"{folder}/run",
            }
        )
        try:
            finetune(recipe)
        except TuneforkError as error:
            return Check("training", False, str(error))
    return Check("training", True, "two steps of the embedded model, measured, kept and reported")
