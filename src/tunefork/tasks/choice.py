"""Multiple choice: every row brings its own candidates; the most likely one a token is the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tunefork.data.rows import Row
from tunefork.data.values import label_text, look_up, plain_text, shorten
from tunefork.errors import DataError
from tunefork.metrics import MeanStatistic
from tunefork.recipe.schema import TaskSection
from tunefork.tasks.base import Example, Form, Objective, Prediction, Statistic
from tunefork.tasks.labelled import MOST_CANDIDATES
from tunefork.tasks.spec import SpecTask, TaskSpec, group_of, named_values
from tunefork.tasks.template import fill


class ChoiceTask(SpecTask):
    """2..n candidates a row, compared by length-normalised log-likelihood after the prompt.

    The right one is given as its position from 0, its text, its letter, or a list of texts of which any is right.
    `most` is the largest number of candidates among the training rows, 0 where there are none: with more than
    MOST_CANDIDATES, training looks at the right answer only.
    """

    form: Form = "choice"

    def __init__(self, spec: TaskSpec, section: TaskSection, rows: Sequence[Row]) -> None:
        super().__init__(spec, ("accuracy",))
        self.automatic_objective = section.objective in ("auto", None)
        fitting: Objective = "candidates" if self._most(rows) <= MOST_CANDIDATES else "answer"
        self.objective: Objective = section.objective if section.objective not in ("auto", None) else fitting

    def example(self, row: Row, *, labelled: bool = True) -> Example:
        """Raises DataError for a missing field, fewer than two choices, or a right answer that is none of them."""
        values = named_values(self.spec, row)
        texts = self._choices(values, row.source)
        golds: tuple[int, ...] = ()
        given = look_up(values, self.spec.right)
        if isinstance(given, list):  # several mentions of one entity are one candidate
            texts = list(dict.fromkeys(texts))
            golds = _among(given, texts, row.source) if labelled else ()
        if len(texts) < 2:
            raise DataError(f"{row.source}: a choice needs at least two candidates. Received {len(texts)}.")
        if len(set(texts)) < len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            raise DataError(f"{row.source}: candidates must differ. Received {shorten(twice)!r} twice.")
        if labelled and not isinstance(given, list):
            golds = _one_of(given, texts, _names(values, self.spec.choices), row.source)
        prompt = fill(self.spec.prompt, "task.prompt", values, row.source)
        candidates = tuple(
            fill(self.spec.choice, "task.choice", {**values, "value": text}, row.source) for text in texts
        )
        return Example(
            source=row.source,
            prompt=prompt,
            text="".join([prompt, *candidates]),  # the same question with other choices is another question
            candidates=candidates,
            gold=golds[0] if golds else None,
            golds=golds,
            group=group_of(self.spec, values, row.source),
        )

    def by_position(self, row: Row) -> bool:
        """Whether the row's right answer was read as a position, counted from 0."""
        values = named_values(self.spec, row)
        given = look_up(values, self.spec.right)
        text = label_text(given)
        if text is None or not text.isdecimal():
            return False
        texts = self._choices(values, row.source)
        return not _names(values, self.spec.choices) and (isinstance(given, int) or text not in texts)

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        """Raises DataError when a row has no right answer."""
        without = next((p for p in predictions if not p.golds and p.gold_index is None), None)
        if without is not None:
            raise DataError(f"{without.source}: a metric needs the row's right answer. Received none.")
        return [MeanStatistic("accuracy", [float(p.index in (p.golds or (p.gold_index,))) for p in predictions])]

    def _most(self, rows: Sequence[Row]) -> int:
        if not isinstance(self.spec.choices, str):
            return len(self.spec.choices)
        found = (_items(look_up(named_values(self.spec, part), self.spec.choices)) for part in self.rows(rows))
        return max((len(items) for items in found if items is not None), default=0)

    def _choices(self, values: Mapping[str, Any], source: str) -> list[str]:
        if not isinstance(self.spec.choices, str):
            return [fill(template, "task.choices", values, source) for template in self.spec.choices]
        given = look_up(values, self.spec.choices)
        items = _items(given)
        if items is None:
            raise DataError(
                f"{source}: the field `{self.spec.choices}` must list the choices. Received {shorten(given)!r}; the "
                f"row has {', '.join(sorted(map(str, values)))}. "
                'Try --set \'task.choices=["{{ choice1 }}", "{{ choice2 }}"]\'.'
            )
        return [fill(self.spec.choice_value, "task.choice_value", {**values, "choice": item}, source) for item in items]


def _items(given: Any) -> list[Any] | None:
    """A list of choices: a list, the hub's {"text": [...], "label": [...]}, or a list written as JSON in a table."""
    if isinstance(given, Mapping):
        given = given.get("text")
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            given = json.loads(given)
        except json.JSONDecodeError:
            return None
    return given if isinstance(given, list) else None


def _names(values: Mapping[str, Any], choices: str | tuple[str, ...]) -> list[str]:
    """The choices' own names, as ARC and OpenBookQA write them beside the texts."""
    given = look_up(values, choices) if isinstance(choices, str) else None
    return [str(name) for name in given.get("label") or ()] if isinstance(given, Mapping) else []


def _among(given: Sequence[Any], texts: Sequence[str], source: str) -> tuple[int, ...]:
    """Places of the texts that `given` lists as right."""
    wanted = {str(item.get("text")) if isinstance(item, Mapping) else str(item) for item in given}
    found = tuple(i for i, text in enumerate(texts) if text in wanted)
    if wanted and not found:
        raise DataError(f"{source}: a right answer must be among the choices. Received {sorted(wanted)!r}.")
    return found


def _one_of(given: Any, texts: Sequence[str], names: Sequence[str], source: str) -> tuple[int, ...]:
    """The place that `given` names: a name, a text, a position from 0, or a letter; empty where nothing is given."""
    label = label_text(given)
    if label is None:
        return ()
    if label in names:
        return (names.index(label),)
    text = plain_text(given)
    if text in texts and not isinstance(given, int):
        return (texts.index(text),)
    if label.isdecimal() and int(label) < len(texts):
        return (int(label),)
    if len(label) == 1 and "A" <= label.upper() <= "Z" and ord(label.upper()) - ord("A") < len(texts):
        return (ord(label.upper()) - ord("A"),)
    raise DataError(
        f"{source}: the right answer must be a position from 0 to {len(texts) - 1}, or one of the choices. "
        f"Received {given!r}."
    )
