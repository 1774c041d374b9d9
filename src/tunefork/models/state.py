"""The trained part of a model as named tensors, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tunefork.errors import RunError, did_you_mean


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """name -> a copy of every parameter that is trained, on its own device.

    Weights that are tied appear once. No model or adapter offered here has a buffer that training changes.
    """
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `trainable_state` returned, bit for bit. Raises RunError, changing nothing, where it differs."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(own.keys() ^ state.keys()):
        where = "the model trains it, the state lacks it" if name in own else "the model does not train it"
        raise RunError(
            f"A state must hold exactly the weights the model trains. Received {name!r}: {where}."
            f"{did_you_mean(name, state if name in own else own)} Try the recipe the state was written with."
        )
    for name, parameter in own.items():
        if (parameter.shape, parameter.dtype) != (state[name].shape, state[name].dtype):
            raise RunError(
                f"Weight {name!r} must be {tuple(parameter.shape)} in {parameter.dtype}. "
                f"Received {tuple(state[name].shape)} in {state[name].dtype}. "
                "Try the recipe the state was written with."
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
