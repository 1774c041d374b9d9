"""The Recipe: everything that decides a run, as frozen data. The YAML path of a field is its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tunefork.errors import RecipeError
from tunefork.recipe.sentences import sentences

Auto = Literal["auto"]
ModelKind = Literal["causal", "masked", "encoder"]
AdapterName = Literal["none", "lora", "qlora", "dora", "prefix", "head"]
Layout = Literal["auto", "columns", "prompt_completion", "alpaca", "sharegpt", "openai", "preference", "text"]
TaskKind = Literal["classification", "choice", "generation", "chat", "preference", "scoring"]
Beta = Annotated[float, Field(ge=0, lt=1)]
BaselineName = Literal["majority", "tfidf", "zero_shot", "in_context", "probe", "lead3"]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _named(value: Any) -> Any:
    """`model: folder` is short for `model: {name: folder}`."""
    return {"name": value} if isinstance(value, str) else value


def _texts(value: Any) -> Any:
    """Keys and values of `labels` may be written as numbers; they are compared as text."""
    if not isinstance(value, dict):
        return value
    return {_text(k): _text(v) for k, v in cast(dict[Any, Any], value).items()}


def _text(value: Any) -> Any:
    """`1` and `1.0` as `"1"`, `true` as `"true"`: as values of a file are compared."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def _one_device(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("cuda:", "cuda,")):
        raise ValueError("should be one device, `cuda`: CUDA_VISIBLE_DEVICES says which; several are not supported")
    return value


class ModelSection(Section):
    name: str = Field(default="embedded", description="folder or hub name of the model; `embedded` is the one shipped")
    kind: ModelKind | Auto = Field(
        default="auto", description="causal, masked or encoder; auto reads the model's config"
    )
    revision: str | None = Field(default=None, description="hub revision")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="number format the model computes in"
    )
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], BeforeValidator(_one_device)] = Field(
        default="auto", description="auto: CUDA, then MPS, then CPU"
    )
    max_length: Annotated[int, Field(ge=8)] | Auto = Field(default="auto", description="longest sequence, in tokens")
    trust_remote_code: bool = Field(
        default=False, description="run code that comes with the model; off unless asked for"
    )


class DataSection(Section):
    train: str | None = Field(default=None, description="file of training rows, or hub:owner/name[:config]")
    dev: str | None = Field(
        default=None, description="file for choosing (early stopping); carved from train when absent"
    )
    test: str | None = Field(default=None, description="file read once, at the end; carved from train when absent")
    layout: Layout = Field(default="auto", description="how rows are laid out")
    fields: dict[str, str] = Field(default_factory=dict, description="name the task uses -> column of the file")
    labels: Annotated[dict[str, str] | None, BeforeValidator(_texts)] = Field(
        default=None, description="value in the file -> name shown to the model"
    )
    dev_fraction: float = Field(
        default=0.1, ge=0, lt=0.5, description="part of train carved off when no dev file is given"
    )
    test_fraction: float = Field(
        default=0.2, ge=0, lt=0.8, description="part of train carved off when no test file is given"
    )
    split_seed: int = Field(
        default=0, ge=0, lt=2**31, description="of carved splits and row limits; `seed` leaves them alone"
    )
    group_field: str | None = Field(
        default=None, description="rows with the same value never fall into different splits"
    )
    rows_per_label: int | None = Field(
        default=None, ge=1, description="k-shot: this many training and as many dev rows of each label (seeded)"
    )
    train_rows: int | None = Field(
        default=None, ge=1, description="use at most this many training rows of the file (seeded, stratified)"
    )
    dev_rows: int | None = Field(
        default=None, ge=1, description="use at most this many dev rows of the file (seeded, stratified)"
    )
    test_rows: int | None = Field(
        default=None, ge=1, description="use at most this many test rows of the file (seeded, stratified)"
    )
    max_unusable: float = Field(
        default=0.01, ge=0, le=1, description="share of rows that may be unusable before refusing"
    )
    max_conflicts: float = Field(default=0.1, ge=0, le=1, description="share of rows with contradictory labels allowed")
    max_leaked: float = Field(default=0.05, ge=0, le=1, description="share of dev or test rows also in train allowed")
    max_cut: float = Field(default=0.2, ge=0, le=1, description="share of rows cut to max_length before refusing")


class TaskSection(Section):
    """What is asked of the model. Everything but the name overrides what the preset or kind says.

    `form` and `objective` become null where the task reads neither.
    """

    name: str = Field(description="a kind (classification, choice, generation, chat, preference, scoring) or a preset")
    form: Literal["auto", "verbalizer", "head"] | None = Field(
        default="auto", description="answer in words (verbalizer) or through a classification head"
    )
    objective: Literal["auto", "candidates", "answer"] | None = Field(
        default="auto", description="cross-entropy over candidates, or on the tokens of the right answer"
    )
    prompt: str | None = Field(default=None, description="Jinja template of the text before the answer")
    masked_prompt: str | None = Field(default=None, description="the same for masked models; holds [MASK] once")
    choices: str | tuple[str, ...] | None = Field(
        default=None, description="choice: templates of the candidates, or the field that lists them"
    )
    answer: str | None = Field(default=None, description="generation: Jinja template of the answer")
    metric: str | None = Field(default=None, description="the metric that chooses the best checkpoint")
    stop: tuple[str, ...] | None = Field(
        default=None, description="generation ends at these strings, besides the end token"
    )
    max_new_tokens: int | None = Field(default=None, ge=1, description="longest generated answer, in tokens")
    beta: float = Field(
        default=0.1, gt=0, le=2, description="preference: how closely the model is held to the one it started from"
    )
    chat_template: bool = Field(default=False, description="put the prompt through the model's chat template")


class AdapterSection(Section):
    """`alpha` and `targets` become null where the adapter is no LoRA."""

    name: AdapterName | Auto = Field(default="auto", description="which weights are trained: none is all of them")
    rank: int = Field(default=16, ge=1, le=1024, description="lora rank")
    alpha: Annotated[float, Field(gt=0)] | Auto | None = Field(
        default="auto", description="lora scale x rank; auto: 2 x rank"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="lora dropout")
    targets: tuple[str, ...] | Auto | None = Field(
        default="auto", description="module names; auto: every linear layer in the blocks"
    )
    prefix_tokens: int = Field(default=8, ge=1, le=512, description="prefix length")


class TrainSection(Section):
    method: str = Field(default="backprop", description="how weights are changed; `tunefork methods` lists them")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | Auto | None = Field(
        default="auto", description="peak learning rate; null: the method's own, as zo measures one"
    )
    head_start: Literal["probe", "random"] = Field(
        default="probe", description="where a fresh classification head starts: at the linear probe, or as drawn"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="after warm-up, to zero")
    warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(default=0.0, ge=0, lt=1, description="decoupled, on matrices only")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="AdamW")
    adam_epsilon: float = Field(default=1e-8, gt=0, lt=1, description="AdamW")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="clip the gradient to this norm; null: never")
    batch_size: Annotated[int, Field(ge=1)] | Auto = Field(default="auto", description="rows a step")
    micro_batch_size: Annotated[int, Field(ge=1)] | Auto = Field(default="auto", description="rows a forward pass")
    sampling: Literal["shuffled", "stratified"] | Auto = Field(
        default="auto",
        description="rows of a step: any, or with labels (in a choice, the right one's place) in proportion to all",
    )
    epochs: Annotated[float, Field(gt=0)] | Auto = Field(default="auto", description="passes over the training rows")
    max_steps: int | None = Field(
        default=None, ge=1, le=10**9, description="stop after this many steps, whatever epochs says"
    )
    activation_checkpointing: bool | Auto = Field(
        default="auto", description="recompute activations: less memory, slower"
    )
    evaluate_every: Annotated[int, Field(ge=1)] | Auto = Field(
        default="auto", description="steps between looks at dev, from 0 on"
    )
    save_every: Annotated[int, Field(ge=1)] | Auto = Field(default="auto", description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest ones kept, besides the best")
    patience: int | None = Field(
        default=None, ge=1, description="stop after this many looks at dev without a better one"
    )
    keep_best: bool = Field(default=True, description="end with the weights best on dev, the start's among them")
    tensorboard: bool = Field(default=False, description="write TensorBoard events into the run folder")


class ZoSection(Section):
    """The method zo; what is null is the preset's. Nothing here is read by other methods."""

    preset: str = Field(default="default", description="default, mezo or fzoo: everything below at once")
    calibrate: bool | None = Field(
        default=None,
        description="measure epsilon, unless given, and the highest learning rate to use; null: unless both are given",
    )
    objective: str = Field(
        default="loss",
        description="what is trained for: loss, a metric of the task (accuracy, macro_f1, qwk, rougeL, exact_match …), "
        "or python:module:function, which makes a number, the higher the better, of a list of predictions",
    )
    epsilon: Annotated[float, Field(gt=0, lt=10)] | None = Field(default=None, description="distance of a probe")
    direction: Literal["low_rank", "rademacher", "gaussian"] | None = Field(
        default=None, description="beside frozen matrices, or dense over every trained weight"
    )
    rank: int | None = Field(default=None, ge=1, le=256, description="of one low-rank direction")
    max_rank: int | None = Field(default=None, ge=1, le=1024, description="of all that a matrix can learn")
    estimator: Literal["two_sided", "one_sided"] | None = Field(default=None, description="(L+ - L-) / 2, or L+ - L")
    queries: int | None = Field(default=None, ge=1, le=4096, description="directions a step")
    rows: Literal["shared", "split"] | None = Field(
        default=None, description="every query sees the whole batch, or its own rows of it"
    )
    normaliser: Literal["none", "rms", "std"] | None = Field(
        default=None, description="of the projected gradients: none, their running size, or the step's spread"
    )
    momentum: float | None = Field(default=None, ge=0, le=0.99, description="heavy ball over regenerated directions")
    clip_rms: float | None = Field(
        default=None, gt=0, description="bound on a projected gradient, in running root mean squares"
    )


class HostedSection(Section):
    """Models of a service (`openai:`, `azure:`, `nebius:`, `URL#MODEL`). Nothing here is read for other models."""

    system: str | None = Field(
        default=None, description="system message, in training too; null: the labels or choices there are; empty: none"
    )
    top_logprobs: int = Field(
        default=20, ge=0, le=20, description="alternatives that label probabilities are made of; 0: none are asked for"
    )
    concurrency: int = Field(default=8, ge=1, le=256, description="requests at a time")
    limit: float | None = Field(default=None, ge=0, description="US dollars; within it nothing is asked before paying")
    prices: str | None = Field(default=None, description="price table of one's own, YAML")
    cache: str | None = Field(default=None, description="folder of answers that were paid for; null: the user's cache")
    suffix: str | None = Field(default=None, max_length=64, description="part of the tuned model's name")
    learning_rate_multiplier: float | None = Field(
        default=None, gt=0, description="of the service's own rate; null: the service chooses"
    )
    job: dict[str, Any] = Field(
        default_factory=dict, description="further fields of a job's request: {trainingType: GlobalStandard}"
    )
    request: dict[str, Any] = Field(
        default_factory=dict, description="fields of a chat request in place of ours; null leaves one out"
    )


class EvaluateSection(Section):
    baselines: tuple[BaselineName, ...] | Auto = Field(default="auto", description="what to set beside the result")
    demonstrations: int = Field(default=4, ge=1, le=64, description="examples shown to the in_context baseline")
    bootstrap: int = Field(default=2000, ge=100, description="resamples behind each interval")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="of the intervals")
    tokens_per_batch: int = Field(
        default=4096, ge=64, description="padded tokens in an evaluation batch; fewer of a large vocabulary"
    )


class Recipe(Section):
    """A whole run. `model`, `task` and `adapter` may be given as a bare name.

    Raises RecipeError naming each key that is unknown, missing or out of range.
    """

    model: Annotated[ModelSection, BeforeValidator(_named)] = ModelSection()
    task: Annotated[TaskSection, BeforeValidator(_named)]
    data: DataSection = DataSection()
    adapter: Annotated[AdapterSection, BeforeValidator(_named)] = AdapterSection()
    train: TrainSection = TrainSection()
    zo: ZoSection = ZoSection()
    hosted: HostedSection = HostedSection()
    evaluate: EvaluateSection = EvaluateSection()
    out: str | None = Field(default=None, description="the run's folder; runs/TASK-MODEL-N when absent")
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="of initial weights, order of rows, dropout and demonstrations"
    )

    if not TYPE_CHECKING:  # for type checkers the arguments are the fields

        def __init__(self, **sections: Any) -> None:
            try:
                super().__init__(**sections)
            except ValidationError as error:
                raise RecipeError(sentences(error, type(self))) from None
