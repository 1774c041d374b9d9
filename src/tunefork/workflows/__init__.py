"""The commands as typed functions: each joins the rooms below into one job."""

from tunefork.evaluate.trained import Trained, is_trained, load_trained
from tunefork.workflows.chat import Chat
from tunefork.workflows.compare import Comparison, compare
from tunefork.workflows.demo import demo, demo_rows
from tunefork.workflows.doctor import doctor
from tunefork.workflows.evaluate import Evaluation, evaluate
from tunefork.workflows.finetune import Listener, Plan, RunResult, finetune, plan_run
from tunefork.workflows.hosted_plan import HostedPlan, export_lines, plan_hosted
from tunefork.workflows.inspect import DataCheck, ShownRow, check_data, show_data
from tunefork.workflows.predict import Predictions, predict
from tunefork.workflows.replay import Replayed, replay
from tunefork.workflows.seeds import SeedsResult, finetune_seeds, seed_recipes
from tunefork.workflows.tuned import cancel_hosted, name_deployment, tuned_model

__all__ = [
    "Chat",
    "Comparison",
    "DataCheck",
    "Evaluation",
    "HostedPlan",
    "Listener",
    "Plan",
    "Predictions",
    "Replayed",
    "RunResult",
    "SeedsResult",
    "ShownRow",
    "Trained",
    "cancel_hosted",
    "check_data",
    "compare",
    "demo",
    "demo_rows",
    "doctor",
    "evaluate",
    "export_lines",
    "finetune",
    "finetune_seeds",
    "is_trained",
    "load_trained",
    "name_deployment",
    "plan_hosted",
    "plan_run",
    "predict",
    "replay",
    "seed_recipes",
    "show_data",
    "tuned_model",
]
