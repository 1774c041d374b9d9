"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, steps: int, warmup: float, schedule: str) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up over a share `warmup`, then linear, cosine or constant.

    After warm-up, linear and cosine equal transformers' `get_linear_schedule_with_warmup` and
    `get_cosine_schedule_with_warmup`; during it the first step is not spent at rate zero.
    """
    warm = int(warmup * steps)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, steps - warm)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
