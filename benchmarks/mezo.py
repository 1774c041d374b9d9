"""MeZO's published step, written again from its description, as the thing to compare with.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (NeurIPS 2023, arXiv 2305.17333), Algorithm 1,
and the arithmetic of the authors' program (princeton-nlp/MeZO, 552cb1b): four sweeps over the weights a step. Each
draws its Gaussian noise again with `torch.normal` after `torch.manual_seed`, in the parameter's own dtype, and makes
new tensors instead of changing the old ones; the loss has whatever dtype the model gives it. Imports nothing of
Tunefork. It sets the global torch generator, as the original does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

NOT_DECAYED = ("bias", "layer_norm", "layernorm")


class MeZO:
    """SPSA with one query and plain SGD, over all parameters of `model` that ask for gradients.

    Args:
        model: is put in evaluation mode by every step.
        lr, epsilon, weight_decay: the paper's eta, epsilon and lambda. `lr` may be changed from step to step.
        seed: of the numpy generator that each step's torch seed is drawn from.
        keep_noise: a step draws its noise once and keeps it, a number a weight: the same bits, in less time. As
            published it is drawn four times.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float,
        epsilon: float,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        keep_noise: bool = False,
    ) -> None:
        self.model, self.lr, self.epsilon, self.weight_decay = model, lr, epsilon, weight_decay
        self.seeds = np.random.RandomState(seed)
        self.projected_gradient = 0.0
        self.kept: list[torch.Tensor] | None = [] if keep_noise else None

    def step(self, loss_closure: Callable[[], torch.Tensor]) -> float:
        """One step; returns the loss on the first side."""
        self.model.eval()
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        seed = int(self.seeds.randint(1_000_000_000))
        if self.kept is not None:
            self.kept.clear()

        self._move(trained, seed, 1)
        first = self._loss(loss_closure)
        self._move(trained, seed, -2)
        second = self._loss(loss_closure)
        self.projected_gradient = float(((first - second) / (2 * self.epsilon)).item())
        self._move(trained, seed, 1)

        for (name, p), z in zip(trained, self._noise(trained, seed), strict=True):
            if any(part in name for part in NOT_DECAYED):
                p.data = p.data - self.lr * (self.projected_gradient * z)
            else:
                p.data = p.data - self.lr * (self.projected_gradient * z + self.weight_decay * p.data)
        return float(first)

    def _move(self, trained: list[tuple[str, torch.nn.Parameter]], seed: int, factor: int) -> None:
        """Every parameter moves by factor * epsilon * z, the same z for the same seed."""
        for (_, p), z in zip(trained, self._noise(trained, seed), strict=True):
            p.data = p.data + factor * z * self.epsilon

    def _noise(self, trained: list[tuple[str, torch.nn.Parameter]], seed: int) -> Iterator[torch.Tensor]:
        if self.kept:
            yield from self.kept
            return
        torch.manual_seed(seed)
        for _, p in trained:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            if self.kept is not None:
                self.kept.append(z)
            yield z

    @staticmethod
    def _loss(loss_closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return loss_closure().detach()
