"""What is asked of the model: classification, choice, generation, chat and scoring; presets are data."""

from tunefork.tasks.base import Example, Message, Prediction, Statistic, Task, TaskInfo
from tunefork.tasks.build import build_examples, list_tasks, make_task, split_rows
from tunefork.tasks.loss import Hits, normalised_scores, row_losses, row_scores

__all__ = [
    "Example",
    "Hits",
    "Message",
    "Prediction",
    "Statistic",
    "Task",
    "TaskInfo",
    "build_examples",
    "list_tasks",
    "make_task",
    "normalised_scores",
    "row_losses",
    "row_scores",
    "split_rows",
]
