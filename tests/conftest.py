"""What every test shares: one thread, no network, tiny models built once a session, real data where it lies beside.

Tests run on the CPU, whose numbers are the same everywhere; with TUNEFORK_TEST_GPU=1 on a GPU (`make test-gpu`).
"""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads this once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("TUNEFORK_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores what tests send


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data beside the repository ({folder})")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> folder of a tiny random model of that kind, built on first use. Never write into it."""
    built: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in built:
            built[kind] = tiny_model(kind, tmp_path_factory.mktemp(f"tiny-{kind}"))
        return built[kind]

    return folder
