"""Fills every `auto` of a recipe from what is known of model, data and machine, and keeps the reason for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tunefork.errors import RecipeError
from tunefork.recipe.schema import AdapterSection, DataSection, EvaluateSection, Recipe

_ROW_FORWARDS = 160_000  # of a zeroth-order run: 5,000 steps of two sides of sixteen rows

OPEN = {("train.learning_rate", None), ("zo.calibrate", None)}
"""Keys whose null is as open as `auto`."""


class UsualBatch(NamedTuple):
    """What a step sees where the recipe does not say: how many rows, why, which (`train.sampling`), each how often."""

    rows: int = 16
    why: str = ""
    sampling: str = "shuffled"
    evaluations: int = 1


@dataclass(frozen=True, slots=True)
class Situation:
    """What the automatic values depend on."""

    model_kind: str
    parameters: int
    max_positions: int
    max_length: int  # tokens at which rows were cut
    device: str  # "cpu", "cuda", "mps"
    dtype: str  # "fp32", "bf16", "fp16", as chosen for the device
    dtype_reason: str
    kind_reason: str
    form: str  # verbalizer, choice, head, text, chat
    objective: str  # candidates, answer, preference
    layout: str  # of the rows
    targets: Callable[[], Sequence[str]]  # names of the layers that LoRA is put beside, when nobody says which
    train_rows: int
    longest: int  # tokens of the longest rendered row of any split
    sequences_per_row: int  # 1, or the number of candidates that are sequences of their own
    has_dev: bool
    quantized: bool
    baselines: tuple[str, ...]  # that fit the task
    checkpointing_needed: bool  # the forecast without activation checkpointing does not fit
    needs_backward: bool = True  # the method computes gradients
    beside: tuple[str, ...] = ()  # adapters with which it leaves the model as it is
    usual_batch: UsualBatch = field(default_factory=UsualBatch)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an automatic value is what it is."""

    path: str
    value: Any
    why: str

    @property
    def guessed(self) -> bool:
        """Whether it is a column that was found, which the recipe does not name."""
        return self.path.startswith("data.fields.")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe without a single `auto` (null is what has no use in it), the reasons, and the step counts."""

    recipe: Recipe
    reasons: tuple[Reason, ...]
    steps: int
    steps_per_epoch: int


def resolve(recipe: Recipe, now: Situation) -> Resolved:
    """Every `auto` replaced. The same recipe and situation always give the same values.

    Raises RecipeError for a `max_length` beyond the model's positions, and for settings that nothing would read.
    """
    reasons: list[Reason] = []
    tree = recipe.model_dump()
    if recipe.model.max_length != "auto" and recipe.model.max_length > now.max_positions:
        raise RecipeError(
            f"`model.max_length` must be at most {now.max_positions}, the positions this model has. "
            f"Received {recipe.model.max_length}. Try leaving it out."
        )

    def fill(path: str, value: Any, why: str) -> Any:
        """Sets the value if it was automatic; returns what holds."""
        section, _, name = path.partition(".")
        given = tree[section][name]
        if given == "auto" or (given is None and value is not None):
            tree[section][name] = value
            reasons.append(Reason(path, value, why))
        return tree[section][name]

    fill("model.kind", now.model_kind, now.kind_reason)
    fill("model.device", now.device, {"cpu": "no accelerator found"}.get(now.device, f"{now.device} found"))
    fill("model.dtype", now.dtype, now.dtype_reason)
    fill("model.max_length", now.max_length, _length_reason(now))

    labelled = now.form in ("verbalizer", "head")
    fill("task.form", *((now.form, _form_reason(now)) if labelled else (None, "read by tasks with labels")))
    asked = now.form in ("verbalizer", "head", "choice") and now.objective != "preference"
    fill("task.objective", *((now.objective, _objective_reason(now)) if asked else (None, "read where one is chosen")))
    fill("data.layout", now.layout, "told from the keys of the rows")

    adapter = fill("adapter.name", *_adapter(now))
    is_lora = adapter in ("lora", "dora") or (adapter == "qlora" and adapter not in now.beside)
    if is_lora:
        fill("adapter.alpha", float(2 * tree["adapter"]["rank"]), "2 x rank")
        if tree["adapter"]["targets"] in ("auto", None):
            fill("adapter.targets", tuple(now.targets()), "every linear layer in the blocks")
    for path in ("adapter.alpha", "adapter.targets"):
        fill(path, None, f"not read by {adapter} with this method")
    _refuse_unread(recipe, adapter, is_lora, now, asked)

    if now.needs_backward:
        fill("train.learning_rate", *_learning_rate(adapter, now.parameters))
    else:
        given = tree["train"]["learning_rate"] not in ("auto", None) and tree["zo"]["epsilon"] is not None
        why = "learning rate and epsilon are " + ("given" if given else "not both given; what is not is measured")
        calibrate = fill("zo.calibrate", not given, why)
        fill("train.learning_rate", None, "what the calibration measures" if calibrate else "the preset's")
    rows, because, sampling, evaluations = now.usual_batch
    why = f"{rows} rows, or all of them when there are fewer" + f": {because}" * bool(because)
    batch = fill("train.batch_size", min(rows, max(1, now.train_rows)), why)
    if not asked or sampling == "shuffled":
        fill("train.sampling", "shuffled", "a fresh order every epoch")
    else:
        fill("train.sampling", sampling, "slopes differ less where every step has the labels in proportion")
    budget = 4096 if now.device == "cpu" else 16384
    rows = max(1, budget // max(1, now.longest * now.sequences_per_row))
    micro = min(batch, 2 ** int(math.log2(rows)))
    fill("train.micro_batch_size", micro, f"at most {budget} padded tokens a forward pass")
    per_epoch = max(1, math.ceil(now.train_rows / batch))
    epochs = fill(
        "train.epochs",
        *_epochs(per_epoch, tree["train"]["max_steps"], None if now.needs_backward else now.train_rows * evaluations),
    )
    steps = max(1, round(epochs * per_epoch))
    if tree["train"]["max_steps"] is not None:
        steps = min(steps, tree["train"]["max_steps"])
    look = max(min(10, steps), steps // 10)
    fill(
        "train.evaluate_every",
        look,
        "about ten looks at dev and one before, ten steps apart or more" if now.has_dev else "no dev rows: never used",
    )
    fill("train.save_every", look, "with every look at dev")
    fill(
        "train.activation_checkpointing",
        now.checkpointing_needed,
        "the forecast without it does not fit the memory there is" if now.checkpointing_needed else "memory suffices",
    )
    baselines = fill("evaluate.baselines", now.baselines, "all that fit the task")
    refuse_demonstrations(recipe.evaluate, baselines)
    return Resolved(Recipe.model_validate(tree), tuple(reasons), steps, per_epoch)


def _refuse_unread(recipe: Recipe, adapter: str, is_lora: bool, now: Situation, asked: bool) -> None:
    """Raises RecipeError for the first setting that was given and that nothing would read."""
    own, default = recipe.adapter, AdapterSection()
    for name in ("rank", "alpha", "dropout", "targets", "prefix_tokens"):
        given = getattr(own, name)
        read = adapter == "prefix" if name == "prefix_tokens" else is_lora
        automatic = name == "alpha" and given == 2 * own.rank  # as recipes were kept that had no use for it
        if not read and not automatic and given not in (getattr(default, name), None):
            raise RecipeError(
                f"`adapter.{name}` must be read by the adapter. Received {given!r} with adapter {adapter}"
                f"{' (auto)' * (own.name == 'auto')}. "
                f"Try --adapter {'prefix' if name == 'prefix_tokens' else 'lora'}, or leave it out."
            )
    for split, share in (("dev", recipe.data.dev_fraction), ("test", recipe.data.test_fraction)):
        name = f"{split}_fraction"
        if getattr(recipe.data, split) is not None and share not in (0, getattr(DataSection(), name)):
            raise RecipeError(
                f"`data.{name}` is a share of the training rows, for want of a file. Received {share:g} beside "
                f"`data.{split}`. Try one of the two."
            )
    if recipe.train.sampling == "stratified" and not asked:
        raise RecipeError(
            "`train.sampling` must have one right candidate a row to go by. Received 'stratified' for a task without. "
            "Try leaving it out."
        )
    if recipe.train.head_start != "probe" and now.form != "head":
        raise RecipeError(
            f"`train.head_start` must have a head to start. Received {recipe.train.head_start!r} for a task of the "
            f"form {now.form}. Try leaving it out, or --form head for a classification."
        )


def refuse_demonstrations(section: EvaluateSection, baselines: Sequence[str]) -> None:
    """Raises RecipeError for a number of demonstrations that no baseline shows."""
    if "in_context" not in baselines and section.demonstrations != EvaluateSection().demonstrations:
        raise RecipeError(
            "`evaluate.demonstrations` is read by the baseline in_context. Received it with "
            f"{', '.join(baselines) or 'no baselines'}. Try adding in_context to evaluate.baselines, or leaving it out."
        )


def _form_reason(now: Situation) -> str:
    return "an encoder has no words" if now.model_kind == "encoder" else f"a {now.model_kind} model can answer in words"


def _objective_reason(now: Situation) -> str:
    if now.objective == "answer":
        return "many candidates of several tokens: the right one alone is trained"
    return "few candidates, or of one token each: all of them are looked at"


def _adapter(now: Situation) -> tuple[str, str]:
    if now.quantized:
        return "qlora", "the model is stored in 4 bits"
    if not now.needs_backward:
        return "none", "the weights stay as they are, what is learned lies beside them"
    if now.parameters < 200_000_000:
        return "none", f"{now.parameters / 1e6:.0f}M parameters: training all of them is cheap"
    return "lora", f"{now.parameters / 1e9:.1f}G parameters: far less memory than training all of them"


def _learning_rate(adapter: str, parameters: int) -> tuple[float, str]:
    """Rules of thumb: smaller models bear larger steps; adapters ten times what full training does."""
    size = f"{parameters / 1e6:.0f}M parameters"
    if adapter == "none":
        return _two_digits(min(1e-3, max(1e-5, 5e-5 * math.sqrt(1e8 / parameters)))), f"full training, {size}"
    if adapter == "head":
        return 5e-3, "a head on frozen features"
    if adapter == "prefix":
        return 1e-2, "prefixes need large steps"
    return _two_digits(min(3e-3, max(1e-4, 2e-4 * (1e9 / parameters) ** (1 / 3)))), f"{adapter}, {size}"


def _epochs(per_epoch: int, max_steps: int | None, forwards: int | None) -> tuple[float, str]:
    """`forwards`: row-forwards an epoch of a method without a backward pass."""
    if max_steps is not None:
        return float(math.ceil(max_steps / per_epoch)), "as many as max_steps needs"
    if forwards is not None:
        epochs = _ROW_FORWARDS / max(1, forwards)
        why = f"about {_ROW_FORWARDS:,} row-forwards: without gradients it takes many"
        return float(math.ceil(epochs)) if epochs > 10 else _two_digits(epochs), why
    epochs = min(10, max(3, math.ceil(300 / per_epoch)))
    return float(epochs), "3 to 10: enough for about 300 steps"


def _length_reason(now: Situation) -> str:
    longest = f"the longest row has {now.longest:,} tokens"
    if now.max_length == now.max_positions:
        return f"the model's limit; {longest}"
    return f"unasked never more, though the model reads {now.max_positions:,}; {longest}"


def _two_digits(x: float) -> float:
    return float(f"{x:.1e}")
