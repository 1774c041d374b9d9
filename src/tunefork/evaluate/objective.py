"""A metric of the task, or a function of one's own, as what training raises in place of lowering the loss."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tunefork.batch import Batch
from tunefork.errors import RecipeError
from tunefork.evaluate.harness import LOSS, Asking, candidate_prediction, predict_examples
from tunefork.render import Rendered, Renderer
from tunefork.tasks import Prediction, Task
from tunefork.tasks.loss import row_scores
from tunefork.zo import Objective

PYTHON = "python:"
_MEANS = ("accuracy", "exact_agreement", "adjacent_agreement")  # of labels; every metric of text is a mean over rows


def check_objective(name: str, renderer: Renderer) -> None:
    """Raises RecipeError unless `name` is `loss`, a metric of the task, or a function that can be imported."""
    if name == LOSS:
        return
    _value(name, renderer.task)
    if renderer.objective == "answer" and renderer.task.form not in ("text", "chat"):
        raise RecipeError(
            f"A metric compares all candidates, so `zo.objective` {name} needs `task.objective` candidates. Received "
            "answer, which reads the right one alone. Try --set task.objective=candidates."
        )


def is_mean(name: str, task: Task) -> bool:
    """Whether the objective is a mean over rows: then a share of a batch says what all of it would."""
    return name == LOSS or (not name.startswith(PYTHON) and (not task.labels or name in _MEANS))


def make_objective(name: str, asking: Asking, rows: Sequence[Rendered]) -> Objective | None:
    """What the method is to raise, from predictions on batches whose `places` are places in `rows`; None for `loss`.

    Raises RecipeError as `check_objective` does.
    """
    if name == LOSS:
        return None
    check_objective(name, asking.renderer)
    generates = asking.task.form in ("text", "chat")

    def answers(model: torch.nn.Module, batch: Batch) -> list[Prediction]:
        assert batch.places is not None
        examples = [rows[i].example for i in batch.places.tolist()]
        if generates:
            return predict_examples(model, asking, examples, rendered=(), generated=True)
        with asking.compute():
            scores = row_scores(model, batch)
        shares = scores.exp().cpu().numpy()
        return [candidate_prediction(asking.task, e, row) for e, row in zip(examples, shares, strict=True)]

    return Objective(answers, _value(name, asking.task), is_mean(name, asking.task), stackable=not generates)


def _value(name: str, task: Task) -> Callable[[Sequence[Any]], float]:
    if name.startswith(PYTHON):
        return _function(name)
    measured = task.measured_by(name)

    def value(predictions: Sequence[Prediction]) -> float:
        statistic = measured.statistics(predictions)[0]
        found = statistic(np.arange(len(predictions)))
        return found if statistic.higher_is_better else -found

    return value


def _function(name: str) -> Callable[[Sequence[Prediction]], float]:
    """`python:module:function`, the module from the working directory where it is not installed."""
    module, _, attribute = name.removeprefix(PYTHON).partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"`zo.objective` must name a function that can be imported: python:module:function. Received {name!r}: "
            f"{error}. Try the folder in which {module or 'the module'}.py lies as working directory."
        ) from None
    if not callable(found):
        raise RecipeError(
            f"`zo.objective` must name a function of a list of predictions. Received {name!r}, which is a "
            f"{type(found).__name__}. Try `def {attribute}(predictions): ...`."
        )
    return cast(Callable[[Sequence[Prediction]], float], found)
