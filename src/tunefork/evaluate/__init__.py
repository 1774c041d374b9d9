"""How good a model is: predictions, honest baselines on the same rows, figures with intervals."""

from tunefork.evaluate.baselines import (
    BaselineInfo,
    BaselineResult,
    check_baselines,
    fitting_baselines,
    list_baselines,
    run_baselines,
)
from tunefork.evaluate.generate import Generated, generate
from tunefork.evaluate.harness import Asking, look_metrics, mean_loss, predict_examples
from tunefork.evaluate.summary import Change, Value, compare_predictions, gained_lost, measure

__all__ = [
    "Asking",
    "BaselineInfo",
    "BaselineResult",
    "Change",
    "Generated",
    "Value",
    "check_baselines",
    "compare_predictions",
    "fitting_baselines",
    "gained_lost",
    "generate",
    "list_baselines",
    "look_metrics",
    "mean_loss",
    "measure",
    "predict_examples",
    "run_baselines",
]
