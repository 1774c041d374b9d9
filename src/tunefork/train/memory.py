"""Peak memory as it was: anonymous memory above start-up on a CPU, allocated memory on an accelerator."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")


def available_bytes() -> int | None:
    """What a run may take now: free memory of the first CUDA device, else of the machine; None where it is not told."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def anonymous_bytes() -> int | None:
    """This process's anonymous resident memory, or None where the system does not tell (not Linux)."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def _give_back_freed() -> None:
    """Returns to the system what this process has freed: the C library keeps it, and an earlier run's hides a later's.

    Does nothing where the C library is not glibc.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


class PeakMeter:
    """Measures between `start` and `stop`. On a CPU a thread samples every `interval` seconds.

    `kind` says what `value` (bytes) is; `value` is None where nothing can be measured.
    """

    def __init__(self, device: torch.device, interval: float = 0.005) -> None:
        self.device, self.interval = device, interval
        self.kind = {"cuda": "allocated on the GPU", "mps": "not measured"}.get(
            device.type, "anonymous memory above start-up"
        )
        self._peak: int | None = None
        self._start = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMeter:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            _give_back_freed()
            if (now := anonymous_bytes()) is not None:
                self._start = self._peak = now
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._sample()

    @property
    def value(self) -> int | None:
        """Peak so far, bytes above the start; None where nothing can be measured."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return None if self._peak is None else self._peak - self._start

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        now = anonymous_bytes()
        if now is not None and self._peak is not None:
            self._peak = max(self._peak, now)
