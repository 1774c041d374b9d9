"""What the tests of this room share: rows, tasks and tiny models put together as a run does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.tiny import MASKED
from tunefork.data.rows import Row
from tunefork.evaluate.harness import Asking
from tunefork.recipe.schema import DataSection, TaskSection
from tunefork.render import Renderer
from tunefork.tasks import Example, Task, make_task

CPU = torch.device("cpu")

REVIEWS = (
    ("The delivery was fast and the box arrived in one piece.", "good"),
    ("I would not buy this again, the screen broke after two days.", "bad"),
    ("It was great!", "good"),
    ("This is a terrible film; it was bad from start to end, and I have seen many.", "bad"),
    ("Truly wonderful service, thank you.", "good"),
    ("Bad.", "bad"),
)

CHOICES = (
    ("The man lost his keys. So", ("he could not open the door.", "he sang."), 0),
    ("Question: What is the capital of France?", ("Rome", "It is Paris, of course", "Berlin or so"), 1),
    ("Anna", ("and Tom will meet at noon", "no"), 0),
    ("It is okay, neither good nor bad, and the delivery was fast, so I", ("buy again", "would not"), 1),
)


@dataclass(frozen=True)
class Scene:
    """A task, its examples and a model that is asked."""

    model: torch.nn.Module
    task: Task
    renderer: Renderer
    examples: list[Example]

    def asking(self, tokens_per_batch: int = 256, **more: Any) -> Asking:
        return Asking(self.renderer, CPU, tokens_per_batch, **more)


def rows(values: Sequence[Mapping[str, Any]], file: str = "train.csv") -> list[Row]:
    return [Row(dict(v), file, line) for line, v in enumerate(values, 2)]


def reviews(pairs: Sequence[tuple[str, str]] = REVIEWS, file: str = "train.csv") -> list[Row]:
    return rows([{"text": text, "label": label} for text, label in pairs], file)


def choices() -> list[Row]:
    return rows([{"question": q, "choices": list(c), "label": label} for q, c, label in CHOICES])


def scene(folder: Path, kind: str, section: TaskSection, given: Sequence[Row], max_length: int = 200) -> Scene:
    """`given` rows asked of the tiny model in `folder`."""
    model_kind = "masked" if kind in MASKED else "causal"
    task = make_task(section, DataSection(), model_kind, given)
    if task.form == "head":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the head is new
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(task.labels))
    elif model_kind == "masked":
        model = AutoModelForMaskedLM.from_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = Renderer(tokenizer, model_kind, task, max_length, section.chat_template)
    return Scene(model.eval(), task, renderer, [task.example(row) for row in given])
