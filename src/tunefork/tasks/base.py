"""What is asked of a model: a task turns rows into examples, and model outputs into predictions and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tunefork.data.rows import Row
from tunefork.metrics.statistics import Statistic

MASK = "[MASK]"  # where a masked prompt has its answer, whatever the tokenizer's own mask token is called


Form = Literal["verbalizer", "choice", "head", "text", "chat"]
Objective = Literal["candidates", "answer", "preference"]
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. `trained` is false for turns the loss must skip (`weight: 0`)."""

    role: Role
    content: str
    trained: bool = True
    extra: Mapping[str, Any] | None = None  # tool_calls, name … as the template wants them


@dataclass(frozen=True, slots=True)
class Example:
    """A row as a question to the model. Exactly one of candidates, answer, messages carries what is learned."""

    source: str  # "train.csv:12"
    prompt: str = ""  # text before the answer (unused by chat)
    text: str = ""  # the bare text, for word-count baselines and classification heads
    candidates: tuple[str, ...] = ()  # texts the answer is chosen from, as they follow the prompt
    gold: int | None = None  # index of the right candidate; None when the row carries no label
    answer: str | None = None  # text to be generated
    references: tuple[str, ...] = ()  # acceptable answers, for the metrics
    golds: tuple[int, ...] = ()  # every acceptable candidate, where there are several (ReCoRD)
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    group: str = ""  # rows of one group are resampled together


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model said about one row."""

    source: str
    predicted: str  # label name, candidate text, or generated text
    gold: str | None
    index: int | None = None  # predicted candidate
    gold_index: int | None = None
    probabilities: tuple[float, ...] = ()  # over the candidates, sums to 1
    loss: float | None = None  # mean nats a token of the right answer, where it was computed
    stopped: bool | None = None  # generation: ended by itself
    golds: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    group: str = ""
    cut: int = 0  # generation: prompt tokens left out to make room for the answer


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task kind or preset as the registry lists it."""

    name: str
    kind: str
    summary: str
    metric: str
    source: str = ""  # paper or data set the wording comes from


class Task(Protocol):
    """One task bound to one recipe and, where it has labels, to their names."""

    info: TaskInfo
    labels: tuple[str, ...]  # names shown to the model, in order; empty for choice, generation and chat
    form: Form
    objective: Objective
    automatic_objective: bool  # nobody asked for `objective`: the renderer takes candidates where labels are one token
    beta: float | None  # of the objective `preference`
    wording: Mapping[str, Any]  # templates and label names, as JSON: what decides the text
    metric: str  # chooses the best checkpoint
    metrics: tuple[str, ...]
    stop: tuple[str, ...]
    max_new_tokens: int

    def measured_by(self, metric: str) -> Task:
        """The same task with this metric alone. Raises RecipeError for one it does not have."""
        ...

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Rows as the task counts them: nested lists (MultiRC, ReCoRD) are unrolled, one row a question."""
        ...

    def columns(self, row: Row) -> dict[str, str]:
        """Field that the task reads -> the column of the row that it is found in."""
        ...

    def example(self, row: Row, *, labelled: bool = True) -> Example:
        """Without `labelled`, what the row says is right is not looked at.

        Raises DataError naming file, line and column when the row cannot be used.
        """
        ...

    def label_of(self, row: Row) -> str | None:
        """The label a split is stratified by, or None."""
        ...

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        """The task's metrics over these predictions, the choosing one first."""
        ...
