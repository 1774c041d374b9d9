"""The global generators, kept as they stood."""

from __future__ import annotations

import torch


class Randomness:
    """The global generators as they stood: every pass of a step starts from there, as if there had been one pass."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def rewind(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
