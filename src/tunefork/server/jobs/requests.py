"""The body that creates a job, as the specification has it, and one key of our own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Auto = Literal["auto"]
Text = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Text], Field(max_length=16)]


class Body(BaseModel):
    """JSON as it is: no text is read as a number, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Hyperparameters(Body):
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Auto = "auto"
    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = "auto"


class DpoHyperparameters(Hyperparameters):
    beta: Annotated[float, Field(gt=0, le=2)] | Auto = "auto"


class ReinforcementHyperparameters(Hyperparameters):
    compute_multiplier: Annotated[float, Field(gt=1e-5, le=10)] | Auto = "auto"
    eval_interval: Annotated[int, Field(ge=1)] | Auto = "auto"
    eval_samples: Annotated[int, Field(ge=1)] | Auto = "auto"
    reasoning_effort: Literal["default", "low", "medium", "high"] = "default"


class Supervised(Body):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Body):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Reinforcement(Body):
    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(Body):
    """`type` decides; what is given for the other methods is not used."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def _graded(self) -> Method:
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("'reinforcement' needs a section of that name, with a grader.")
        return self

    def chosen(self) -> dict[str, Any]:
        """{"type", "hyperparameters", "given": the rest of the method's own section}."""
        defaults = {"supervised": Supervised, "dpo": Dpo}
        section = getattr(self, self.type) or defaults[self.type]()
        values = section.model_dump()
        return {"type": self.type, "hyperparameters": values.pop("hyperparameters"), "given": values}


class Wandb(Body):
    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] = []


class Integration(Body):
    type: Literal["wandb"]
    wandb: Wandb


class Extension(Body):
    """`tunefork`: parts of the recipe the specification has no word for. They are checked as a recipe is."""

    adapter: str | dict[str, Any] = "lora"
    train: dict[str, Any] = {}


class NewJob(Body):
    model: Annotated[str, Field(min_length=1)]
    training_file: Annotated[str, Field(min_length=1)]
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None  # deprecated in favour of `method`
    method: Method | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    metadata: Metadata | None = None
    tunefork: Extension | None = None

    def chosen_method(self) -> dict[str, Any]:
        given = self.method or Method(
            type="supervised", supervised=Supervised(hyperparameters=self.hyperparameters or Hyperparameters())
        )
        return given.chosen()
