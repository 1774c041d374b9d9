"""A metric of the task, or a function of one's own, as what training raises in place of lowering the loss."""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tunefork import words
from tunefork.batch import Batch
from tunefork.errors import RecipeError, TrainingError, TuneforkError
from tunefork.evaluate.harness import LOSS, Asking, candidate_prediction, predict_examples, right_answer
from tunefork.render import Rendered, Renderer
from tunefork.tasks import Example, Prediction, Task
from tunefork.tasks.loss import row_scores
from tunefork.zo import Objective

PYTHON = "python:"
_TRIED = 64  # predictions
_FAULTS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError)
_FAULTS += (SyntaxError, TypeError, ValueError)  # of code that is not ours
_MEANS = ("accuracy", "exact_agreement", "adjacent_agreement")  # of labels; every metric of text is a mean over rows


def check_objective(name: str, renderer: Renderer, rows: Sequence[Example] = ()) -> None:
    """Raises RecipeError unless `name` is `loss`, a metric of the task, or a function that can be imported.

    A function must also judge made-up answers to `rows`: its faults are then known before a model is loaded.
    """
    if name == LOSS:
        return
    value = _value(name, renderer.task, RecipeError)
    if renderer.objective == "answer" and renderer.task.form not in ("text", "chat"):
        raise RecipeError(
            f"A metric compares all candidates, so `zo.objective` {name} needs `task.objective` candidates. Received "
            "answer, which reads the right one alone. Try --set task.objective=candidates."
        )
    if name.startswith(PYTHON) and (made_up := _made_up(renderer.task, rows)):
        value(made_up)


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


def _made_up(task: Task, rows: Sequence[Example]) -> list[Prediction]:
    """What a model without a clue might say to rows from all over the file, so that no label is missing."""
    texts, draw = task.form in ("text", "chat"), np.random.default_rng(0)
    known = [e for e in rows if (right_answer(e) if texts else e.gold) is not None]
    known = known[:: max(1, len(known) // _TRIED)]
    if not texts:
        return [candidate_prediction(task, e, draw.dirichlet(np.ones(len(task.labels or e.candidates)))) for e in known]
    said = [right_answer(e) or "" for e in known]
    return [
        Prediction(e.source, said[i - 1], said[i], stopped=True, references=e.references, group=e.group)
        for i, e in enumerate(known)
    ]


def _value(name: str, task: Task, refusal: type[TuneforkError] = TrainingError) -> Callable[[Sequence[Any]], float]:
    if name.startswith(PYTHON):
        return _guarded(name, _function(name), refusal)
    measured = task.measured_by(name)

    def value(predictions: Sequence[Prediction]) -> float:
        statistic = measured.statistics(predictions)[0]
        found = statistic(np.arange(len(predictions)))
        return found if statistic.higher_is_better else -found

    return value


def _function(name: str) -> Callable[[Sequence[Prediction]], float]:
    """`python:module:function`, the module from the working directory where it is not installed."""
    module, _, attribute = name.removeprefix(PYTHON).partition(":")
    received = f"`zo.objective` must name a function that can be imported: python:module:function. Received {name!r}"
    if not (module and attribute):
        raise RecipeError(f"{received}. Try {PYTHON}{module or 'my_goals'}:{attribute or 'cost'}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except _FAULTS as error:
        raise RecipeError(
            f"{received}: {type(error).__name__}: {error}. Try the folder in which {module}.py lies as working "
            f"directory, and there `python -c 'from {module} import {attribute}'`."
        ) from error
    if not callable(found):
        raise RecipeError(
            f"`zo.objective` must name a function of a list of predictions. Received {name!r}, which is a "
            f"{type(found).__name__}. Try `def {attribute}(predictions): ...`."
        )
    return cast(Callable[[Sequence[Prediction]], float], found)


def _guarded(name: str, function: Callable[[Sequence[Prediction]], Any], refusal: type[TuneforkError]) -> Any:
    """The function, with a sentence for what it raises and for what is no finite number."""

    def value(predictions: Sequence[Prediction]) -> float:
        try:
            found = function(predictions)
            number = float(found) if isinstance(found, (Real, torch.Tensor)) else math.nan
        except _FAULTS as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            received = f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        else:
            if math.isfinite(number):
                return number
            received = words.trimmed(repr(found), 80)
        raise refusal(
            f"`zo.objective` must give a finite number for every list of predictions. Received {received} from {name}. "
            "Try what `tunefork.tasks.Prediction` holds, and a number, such as 0, where it is not defined."
        )

    return value
