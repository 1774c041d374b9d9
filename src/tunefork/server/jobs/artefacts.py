"""A checkpoint of a run as a model that can be served, made without loading the base it stands on."""

from __future__ import annotations

from pathlib import Path

import torch

from tunefork.files import make_folder, staged_folder
from tunefork.models import load_trainable_state, save_artefact
from tunefork.run import RunFolder
from tunefork.train.checkpoint import load_step
from tunefork.train.prepare import Job as Prepared
from tunefork.train.skeleton import build_skeleton
from tunefork.workflows.finetune import _rendering as rendering_of


def write_checkpoint(prepared: Prepared, run: RunFolder, step: int, folder: Path) -> None:
    """Writes the artefact of a step's weights, as the run itself writes its last one. Raises RunError for damage."""
    model = build_skeleton(
        prepared.facts,
        form=prepared.task.form,
        labels=prepared.task.labels,
        adapter=prepared.recipe.adapter,
        activation_checkpointing=False,
    )
    _materialise(model)
    load_trainable_state(model, load_step(run, step).tensors["weights"])
    make_folder(folder.parent)
    with staged_folder(folder) as place:
        save_artefact(model, prepared.tokenizer, prepared.facts, place, rendering_of(prepared))


def _materialise(model: torch.nn.Module) -> None:
    """Room for the weights that are trained, in the place of shapes alone; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32))
            module._parameters[name] = made[id(parameter)]
