"""Generation: an answer in free text. Question answering, summarisation, completion.

Which metrics: the bare kind is chosen by its loss, with word F1 and ROUGE-L beside it, since nothing is known about
the answers; the presets for short answers (`question_answering`, `squad`) by word F1 with exact match, those for
summaries (`summary`, `dialogsum`) by ROUGE, GSM8K by the final number. `task.metric` puts another one first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunefork.data.rows import Row
from tunefork.data.values import is_blank, look_up, plain_text, shorten
from tunefork.errors import DataError
from tunefork.metrics import MeanStatistic, exact_match, final_number, final_number_match, rouge_l, rouge_n, token_f1
from tunefork.recipe.schema import TaskSection
from tunefork.tasks.base import Example, Form, Prediction, Statistic
from tunefork.tasks.spec import SpecTask, TaskSpec, group_of, named_values
from tunefork.tasks.template import fill, names_in

TEXT_METRICS = {
    "loss": "mean nats a token of the right answer",
    "exact_match": "normalised answer equals a reference",
    "f1": "words shared with the best reference",
    "rouge1": "single words shared with the reference",
    "rouge2": "word pairs shared",
    "rougeL": "longest common subsequence of words",
    "number": "the number after #### is right",
}


class TextTask(SpecTask):
    """The answer follows the prompt and ends with the end token; the loss is on both.

    With `free` (free completion, rows of the layout `text`) the answer is the whole text and the prompt is empty; only
    the loss can judge it. Asked to predict, the text is the prompt, and what follows it the answer.
    """

    form: Form = "text"

    def __init__(self, spec: TaskSpec, section: TaskSection, *, free: bool = False) -> None:
        if free:
            answer = spec.answer if section.answer is not None else "{{ completion }}"
            metrics = spec.metrics if section.metric is not None else ("loss",)
            own = {"text": "{{ text }}", "prompt": "{{ prompt }}", "answer": answer, "metrics": metrics, "fields": {}}
            spec = spec.model_copy(update=own)
        super().__init__(spec, TEXT_METRICS)
        self._free, self._own_prompt = free, section.prompt is not None

    def example(self, row: Row, *, labelled: bool = True) -> Example:
        """Raises DataError for a missing or empty field. A row without an answer can only be predicted."""
        values = named_values(self.spec, row)
        prompt = fill(self.spec.prompt, "task.prompt", values, row.source)
        if self.spec.prompt and is_blank(prompt) and not self._free:
            raise DataError(f"{row.source}: the prompt must not be empty.")
        references = self._references(values) if labelled else ()
        if is_blank(values.get("answer")) or isinstance(values.get("answer"), list | Mapping):
            values["answer"] = references[0] if references else None
        answer = None
        if labelled and all(not is_blank(values.get(name)) for name in names_in(self.spec.answer)):
            answer = fill(self.spec.answer, "task.answer", values, row.source)
            if is_blank(answer):
                raise DataError(f"{row.source}: the answer must not be empty.")
        references = references or (() if answer is None else (answer.strip(),))
        wrong = [text for text in references if "number" in self.metrics and final_number(text) is None]
        if wrong:
            raise DataError(
                f"{row.source}: the metric `number` needs answers that end in `#### <number>`. Received "
                f"{shorten(wrong[0][-60:])!r}. Try --set task.metric=exact_match."
            )
        # a wording of one's own may read other fields than the bare text, and then stands for it
        own = self._own_prompt and not names_in(self.spec.text) <= set(values)
        return Example(
            source=row.source,
            prompt=prompt,
            text=prompt if own else fill(self.spec.text, "task.text", values, row.source),
            answer=answer,
            references=references,
            group=group_of(self.spec, values, row.source),
        )

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        """The loss is left out where a prediction comes without one: from a baseline that is no language model."""
        return text_statistics(self.metrics, predictions)

    def _references(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Texts of fields that hold one or several, in any of the usual shapes."""
        texts: list[str | None] = []
        for name in self.spec.references:
            found = look_up(values, name)
            if isinstance(found, Mapping):  # SQuAD on the hub: {"text": [...], "answer_start": [...]}
                found = found.get("text")
            items = found if isinstance(found, list) else [found]
            texts += [plain_text(item.get("text") if isinstance(item, Mapping) else item) for item in items]
        return tuple(dict.fromkeys(text for text in texts if text is not None and text.strip()))


def text_statistics(metrics: Sequence[str], predictions: Sequence[Prediction]) -> list[Statistic]:
    """Metrics of TEXT_METRICS, and `stopped`, in this order, without those that these predictions do not know.

    Raises DataError when the metric compares with a reference and a row has none.
    """
    found: list[Statistic] = []
    for metric in metrics:
        if metric == "loss":
            losses = [p.loss for p in predictions if p.loss is not None]
            if len(losses) == len(predictions):
                found.append(MeanStatistic(metric, losses, higher_is_better=False))
        elif metric == "stopped":
            stopped = [float(p.stopped) for p in predictions if p.stopped is not None]
            if len(stopped) == len(predictions):
                found.append(MeanStatistic(metric, stopped))
        else:
            found.append(MeanStatistic(metric, [_value(metric, p) for p in predictions]))
    return found


def _value(metric: str, prediction: Prediction) -> float:
    said, references = prediction.predicted, prediction.references
    if not references:
        raise DataError(f"{prediction.source}: `{metric}` compares with a right answer. Received none.")
    if metric == "exact_match":
        return exact_match(said, references)
    if metric == "f1":
        return token_f1(said, references)
    if metric == "number":
        return final_number_match(said, references)
    if metric == "rougeL":
        return max(rouge_l(said, reference).f1 for reference in references)
    return max(rouge_n(said, reference, int(metric[-1])).f1 for reference in references)
