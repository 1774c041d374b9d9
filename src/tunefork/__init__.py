"""Tunefork fine-tunes language models on the machine you have, and measures what came of it.

Importing is cheap; PyTorch is loaded with the first function that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunefork.export.exporting import export
    from tunefork.methods import list_methods
    from tunefork.recipe import Recipe, load_recipe
    from tunefork.report import write_report
    from tunefork.tasks import list_tasks
    from tunefork.workflows import (
        Chat,
        check_data,
        compare,
        demo,
        doctor,
        evaluate,
        finetune,
        finetune_seeds,
        plan_run,
        predict,
        replay,
        show_data,
    )

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "export": "export.exporting",
    "list_methods": "methods",
    "list_tasks": "tasks",
    "write_report": "report",
}

__all__ = [
    "Chat",
    "Recipe",
    "check_data",
    "compare",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "finetune",
    "finetune_seeds",
    "list_methods",
    "list_tasks",
    "load_recipe",
    "plan_run",
    "predict",
    "replay",
    "show_data",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tunefork' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tunefork.{_HOMES.get(name, 'workflows')}"), name)


for _room in ("evaluate", "export"):  # the first import of a room puts it in the place of the function of its name
    importlib.import_module(f"tunefork.{_room}")
    del globals()[_room]
