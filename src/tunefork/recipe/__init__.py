"""What decides a run. `schema` says what can be set, `load` reads it, `resolve` fills what was left automatic."""

from tunefork.recipe.load import ALIASES, all_paths, dump_recipe, load_recipe, make_recipe, parse_labels, parse_sets
from tunefork.recipe.resolve import OPEN, Reason, Resolved, resolve
from tunefork.recipe.schema import (
    AdapterSection,
    DataSection,
    EvaluateSection,
    HostedSection,
    ModelSection,
    Recipe,
    TaskSection,
    TrainSection,
)

__all__ = [
    "ALIASES",
    "OPEN",
    "AdapterSection",
    "DataSection",
    "EvaluateSection",
    "HostedSection",
    "ModelSection",
    "Reason",
    "Recipe",
    "Resolved",
    "TaskSection",
    "TrainSection",
    "all_paths",
    "dump_recipe",
    "load_recipe",
    "make_recipe",
    "parse_labels",
    "parse_sets",
    "resolve",
]
