"""Generation: an answer in free text. Question answering, summarisation, completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tunefork.data.rows import Row
from tunefork.data.values import is_blank, plain_text
from tunefork.errors import DataError, RecipeError, did_you_mean
from tunefork.metrics import MeanStatistic, exact_match, final_number_match, rouge_l, rouge_n, token_f1
from tunefork.metrics.statistics import Statistic
from tunefork.recipe.schema import TaskSection
from tunefork.tasks.base import Example, Prediction, TaskInfo
from tunefork.tasks.spec import TaskSpec, look_up, named_values, unrolled
from tunefork.tasks.template import fill

TEXT_METRICS = {
    "loss": "mean nats a token of the right answer",
    "exact_match": "normalised answer equals a reference",
    "f1": "words shared with the best reference",
    "rouge1": "single words shared with the reference",
    "rouge2": "word pairs shared",
    "rougeL": "longest common subsequence of words",
    "number": "the final number is right",
}


class TextTask:
    """The answer follows the prompt and ends with the end token; the loss is on both."""

    labels: tuple[str, ...] = ()
    form: Literal["text"] = "text"
    objective: Literal["answer"] = "answer"

    def __init__(self, spec: TaskSpec, section: TaskSection) -> None:
        self.spec = spec
        for metric in spec.metrics:
            if metric not in TEXT_METRICS:
                raise RecipeError(
                    f"`task.metric` must be one of {', '.join(TEXT_METRICS)}. Received {metric!r}."
                    f"{did_you_mean(metric, TEXT_METRICS)}"
                )
        self.stop, self.max_new_tokens = spec.stop, spec.max_new_tokens
        self.metrics, self.metric = spec.metrics, spec.metrics[0]
        self.info = TaskInfo(spec.name, spec.kind, spec.summary, self.metric, spec.source)

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        return [part for row in rows for part in unrolled(self.spec, row)]

    def label_of(self, row: Row) -> str | None:
        return None

    def example(self, row: Row) -> Example:
        """Raises DataError for a missing or empty field. A row without an answer can only be predicted."""
        values = named_values(self.spec, row)
        prompt = fill(self.spec.prompt, "task.prompt", values, row.source)
        if not prompt.strip():
            raise DataError(f"{row.source}: the prompt must not be empty.")
        references = self._references(values)
        answer = None
        if references or not is_blank(values.get("answer")):
            first = values.get("answer")
            known = {**values, "answer": references[0] if is_blank(first) or isinstance(first, list) else first}
            answer = fill(self.spec.answer, "task.answer", known, row.source)
            if not answer.strip():
                raise DataError(f"{row.source}: the answer must not be empty.")
        return Example(
            source=row.source,
            prompt=prompt,
            text=fill(self.spec.text, "task.text", values, row.source),
            answer=answer,
            references=references or (() if answer is None else (answer.strip(),)),
            group=fill(self.spec.group, "task.group", values, row.source) if self.spec.group else "",
        )

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        return [text_statistic(metric, predictions) for metric in self.metrics]

    def _references(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Texts of fields that hold one or several, in any of the usual shapes."""
        texts: list[str | None] = []
        for name in self.spec.references:
            found = values.get(name) if name in values else look_up(values, name)
            if isinstance(found, Mapping):  # SQuAD on the hub: {"text": [...], "answer_start": [...]}
                found = found.get("text")
            items = found if isinstance(found, list) else [found]
            texts += [plain_text(item["text"] if isinstance(item, Mapping) else item) for item in items]
        return tuple(dict.fromkeys(text for text in texts if text is not None and text.strip()))


def text_statistic(metric: str, predictions: Sequence[Prediction]) -> Statistic:
    """A metric of TEXT_METRICS over these predictions."""
    return MeanStatistic(metric, [_value(metric, p) for p in predictions], higher_is_better=metric != "loss")


def _value(metric: str, prediction: Prediction) -> float:
    if metric == "loss":
        return prediction.loss if prediction.loss is not None else 0.0
    said, references = prediction.predicted, prediction.references
    if metric == "exact_match":
        return exact_match(said, references)
    if metric == "f1":
        return token_f1(said, references)
    if metric == "number":
        return final_number_match(said, references)
    if metric == "rougeL":
        return max((rouge_l(said, reference).f1 for reference in references), default=0.0)
    return max((rouge_n(said, reference, int(metric[-1])).f1 for reference in references), default=0.0)
