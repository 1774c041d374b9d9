"""A model that was trained here (a run, or an exported artefact), ready to be asked the way it was trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunefork.errors import MissingFileError, RunError
from tunefork.evaluate.harness import Asking
from tunefork.models import (
    ModelFacts,
    autocast,
    choose_device,
    choose_dtype,
    inspect_model,
    load_artefact,
    load_base,
    load_tokenizer,
    read_artefact_info,
    torch_dtype,
)
from tunefork.recipe import DataSection, ModelSection, TaskSection
from tunefork.render import Renderer
from tunefork.run import refuse_hosted
from tunefork.tasks import Task, make_task


@dataclass(frozen=True)
class Trained:
    """A model with its task and its one way of rendering."""

    model: torch.nn.Module
    tokenizer: Any
    facts: ModelFacts
    task: Task
    renderer: Renderer
    data: DataSection  # layout, fields and labels as in training
    device: torch.device
    compute: Callable[[], contextlib.AbstractContextManager[Any]]

    def asking(self, tokens_per_batch: int) -> Asking:
        """How it is asked on its own device."""
        return Asking(self.renderer, self.device, tokens_per_batch, compute=self.compute)


def is_trained(path: str | Path) -> bool:
    """Whether `path` is a run that kept a model, or an artefact this project wrote."""
    return _artefact_folder(Path(path)) is not None


def load_trained(path: str | Path, device: str = "auto", *, trust_remote_code: bool = False) -> Trained:
    """Loads the model of a run folder or artefact. Raises MissingFileError or RunError when there is none."""
    path = Path(path)
    folder = _artefact_folder(path)
    if folder is None:
        if not path.exists():
            raise MissingFileError(f"A run or model folder must be given. Received {str(path)!r}, which is not there.")
        refuse_hosted(path)
        ways = f"`tunefork replay BASE {path} -o DIR`" if (path / "trajectory").is_file() else "another folder"
        raise RunError(
            f"{str(path)!r} must hold a trained model (model/tunefork.json). Received a folder without one. "
            f"Try {ways}, or --resume if it is a run that was interrupted."
        )
    info = read_artefact_info(folder)["extra"]
    section = ModelSection.model_validate({"device": device, "dtype": info["dtype"]})
    place, _ = choose_device(section)
    dtype = torch_dtype(info["dtype"])
    model, tokenizer, facts = load_artefact(folder, place, dtype, trust_remote_code=trust_remote_code)
    data, task = trained_task(info, facts)
    renderer = Renderer(tokenizer, facts.kind, task, info["max_length"], info["task"]["chat_template"])
    return Trained(model, tokenizer, facts, task, renderer, data, place, lambda: autocast(place, dtype))


def trained_task(info: Mapping[str, Any], facts: ModelFacts) -> tuple[DataSection, Task]:
    """How rows are read and what is asked of them, from what is kept with a trained model."""
    data = DataSection(fields=info["fields"], layout=info["layout"], labels=info["label_map"])
    section = TaskSection.model_validate(info["task"])
    return data, make_task(section, data, facts.kind, (), labels=info["labels"] or None)


def load_untrained(section: ModelSection, task: Task, chat_template: bool) -> Trained:
    """Any model folder or hub name as it is, asked the task's question."""
    facts = inspect_model(section)
    place, _ = choose_device(section)
    name, _ = choose_dtype(section, place)
    dtype = torch_dtype(name)
    model, tokenizer = load_base(facts, task.form, task.labels, place, dtype), load_tokenizer(facts)
    limit = facts.max_positions if section.max_length == "auto" else int(section.max_length)
    renderer = Renderer(tokenizer, facts.kind, task, limit, chat_template)
    return Trained(model, tokenizer, facts, task, renderer, DataSection(), place, lambda: autocast(place, dtype))


def _artefact_folder(path: Path) -> Path | None:
    return next((folder for folder in (path / "model", path) if (folder / "tunefork.json").is_file()), None)
