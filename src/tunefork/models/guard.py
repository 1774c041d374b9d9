"""Imports bitsandbytes, where it is installed, so that it fetches nothing. Comes before anything that imports peft."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys


def import_bitsandbytes_quietly() -> None:
    """Imports bitsandbytes with the package `kernels` out of its sight.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) asks `kernels` for a compiled kernel from the hub while it is being
    imported, which PEFT does unasked. A `None` in `sys.modules` makes that one import fail, which bitsandbytes takes
    for an answer; its warning about it is kept from the user. Does nothing where bitsandbytes is loaded or absent.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    kernels = sys.modules.get("kernels")
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]
    logger.setLevel(logging.ERROR)
    try:
        importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


import_bitsandbytes_quietly()
