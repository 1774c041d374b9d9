"""Classification and ordinal scoring: a fixed set of labels, the same for every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from tunefork.data.rows import Row
from tunefork.data.values import counted, is_blank, label_text, listed, shorten
from tunefork.errors import DataError, RecipeError, UnsupportedError, did_you_mean
from tunefork.metrics import AgreementMetric, AgreementStatistic, ConfusionMetric, ConfusionStatistic
from tunefork.recipe.schema import DataSection, ModelKind, TaskSection
from tunefork.tasks.base import MASK, Example, Form, Objective, Prediction, Statistic
from tunefork.tasks.spec import SpecTask, TaskSpec, group_of, named_values, unrolled
from tunefork.tasks.template import fill, names_in

MOST_CANDIDATES = 8  # with more of several tokens each, training looks at the right answer only
_CONFUSION, _AGREEMENT = get_args(ConfusionMetric), get_args(AgreementMetric)


class LabelledTask(SpecTask):
    """One of `labels` a row, as a word after a prompt or through a head. Labels of `scoring` are integers in order."""

    def __init__(
        self,
        spec: TaskSpec,
        section: TaskSection,
        model_kind: ModelKind,
        labels: tuple[str, ...],
        names: Mapping[str, str],
    ) -> None:
        super().__init__(spec, (*_CONFUSION, *(_AGREEMENT if spec.kind == "scoring" else ())))
        self.labels = labels
        self._index = {value: labels.index(name) for value, name in names.items()}
        self.form: Form = _form(section, model_kind)
        self.automatic_objective = section.objective in ("auto", None)
        self.objective: Objective = _objective(section, model_kind, self.form, len(labels))
        self.template, self._key = _template(spec, section, model_kind, self.form)
        self.wording: Mapping[str, Any] = {self._key.removeprefix("task."): self.template, "labels": list(labels)}

    def example(self, row: Row, *, labelled: bool = True) -> Example:
        """Raises DataError for a missing field or an unknown label; a missing label gives `gold` None."""
        values = named_values(self.spec, row)
        prompt = fill(self.template, self._key, values, row.source)
        # a wording of one's own may read other fields than the bare text, and then stands for it
        bare = names_in(self.spec.text) <= set(values) or self.template == self.spec.text
        text = fill(self.spec.text, "task.text", values, row.source) if bare else prompt
        if is_blank(text):
            raise DataError(f"{row.source}: the text must not be empty.")
        if MASK in self.template and prompt.count(MASK) != 1:
            raise DataError(f"{row.source}: a text must not hold {MASK} itself. Received {shorten(text)!r}.")
        space = "" if prompt[-1:].isspace() else " "
        return Example(
            source=row.source,
            prompt=prompt,
            text=text,
            candidates=tuple(space + name for name in self.labels),
            gold=self._gold(values, row.source) if labelled else None,
            group=group_of(self.spec, values, row.source),
        )

    def label_of(self, row: Row) -> str | None:
        """The label's name, or None where it is missing or unknown: what a split is stratified by."""
        place = self._place(label_text(named_values(self.spec, row).get("label")))
        return None if place is None else self.labels[place]

    def statistics(self, predictions: Sequence[Prediction]) -> list[Statistic]:
        """Raises DataError when a row has no label or no predicted one."""
        pairs = [(p.index, p.gold_index) for p in predictions if p.index is not None and p.gold_index is not None]
        if len(pairs) < len(predictions):
            without = next(p.source for p in predictions if p.index is None or p.gold_index is None)
            raise DataError(f"{without}: a metric needs the row's label. Received none. Try a labelled file.")
        predicted, gold = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return [self._statistic(metric, predicted, gold) for metric in self.metrics]

    def _statistic(self, metric: str, predicted: np.ndarray, gold: np.ndarray) -> Statistic:
        for confusion in _CONFUSION:
            if metric == confusion:  # `f1` is that of the last label
                positive = len(self.labels) - 1
                return ConfusionStatistic(confusion, predicted, gold, len(self.labels), positive=positive)
        scale = np.array([int(name) for name in self.labels])
        agreement = next(name for name in _AGREEMENT if name == metric)
        return AgreementStatistic(agreement, scale[predicted], scale[gold], low=int(scale.min()), high=int(scale.max()))

    def _gold(self, values: Mapping[str, object], source: str) -> int | None:
        label = label_text(values.get("label"))
        place = self._place(label)
        if label is not None and place is None:
            raise DataError(
                f"{source}: the label must be one of {listed(list(self._index))}. Received {shorten(label)!r}."
                f"{did_you_mean(label, self._index)}"
            )
        return place

    def _place(self, label: str | None) -> int | None:
        """Which label this is; a name may be written with underscores."""
        return None if label is None else self._index.get(label, self._index.get(label.replace("_", " ")))


def find_labels(
    spec: TaskSpec, rows: Sequence[Row], data: DataSection, names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """(names in order, value in the file -> name): from `data.labels`, the preset, or the rows.

    Values seen in the rows are sorted (as numbers if all are); underscores are shown as spaces. A row may also carry
    the name instead of the value. `names` are those of a trained model, which fix the order. Raises DataError when
    fewer than two labels are found.
    """
    mapping = {label_text(value) or value: name for value, name in (data.labels or spec.labels or {}).items()}
    if data.labels and not names:
        _refuse_unmatched(mapping, _values(spec, rows), data.max_unusable)
    if names:
        mapping = {value: name for value, name in mapping.items() if name in names} | {name: name for name in names}
    elif not mapping:
        values = _seen(spec, rows)
        mapping = {value: value.replace("_", " ") for value in sorted(values, key=_order(values))}
    if spec.kind == "scoring":
        wrong = [name for name in mapping.values() if not _is_integer(name)]
        if wrong:
            raise DataError(
                f"Scores must be whole numbers. Received {wrong[0]!r}. Try --task classification for names."
            )
        whole = range(min(int(n) for n in mapping.values()), max(int(n) for n in mapping.values()) + 1)
        mapping = {str(n): str(n) for n in whole} | mapping  # a score that no training row has still has a place
    found = tuple(names or dict.fromkeys(mapping.values()))
    if spec.kind == "scoring":
        found = tuple(sorted(dict.fromkeys(mapping.values()), key=int))
    if len(found) < 2:
        raise DataError(
            f"`data.labels` must name at least two different labels. Received {listed(found)} for every value. "
            "Try names that differ, as --labels '0=bad,1=good'."
        )
    return found, {name: name for name in found} | mapping


def _refuse_unmatched(mapping: Mapping[str, str], values: Mapping[str, int], allowed: float) -> None:
    """Raises RecipeError where a value is named that no row has, and rows have one that is not named: a misspelling;
    and where more than the `allowed` share of `values` (how many rows have each) is not named.
    """
    rest = [value for value in values if not {value, value.replace("_", " ")} & mapping.keys()]
    unnamed = [value for value in rest if not {value, value.replace("_", " ")} & set(mapping.values())]
    for value, name in mapping.items():
        hint = did_you_mean(value, rest)
        if value not in values and name not in rest and (hint or unnamed):
            raise RecipeError(
                f"`data.labels` must name values of the label column: {listed(sorted(values))}. Received `{value}`, "
                f"which no row has.{hint or ' Try one that is there.'}"
            )
    rows, lost = sum(values.values()), sum(values[value] for value in unnamed)
    if lost > allowed * rows:
        raise RecipeError(
            f"`data.labels` must name every value of the label column. Received {listed(list(mapping))}, and "
            f"{counted(lost, 'row')} of {rows:,} with {listed(sorted(unnamed))}. Try adding '{min(unnamed)}=NAME', or "
            "--set data.max_unusable=1 to leave them out."
        )


def _values(spec: TaskSpec, rows: Sequence[Row]) -> dict[str, int]:
    """Distinct labels of the rows, and how many have each."""
    seen = Counter(label_text(named_values(spec, part).get("label")) for row in rows for part in unrolled(spec, row))
    return {value: n for value, n in seen.items() if value is not None}


def _seen(spec: TaskSpec, rows: Sequence[Row]) -> list[str]:
    """Distinct labels of the rows, at least two of them."""
    values = list(_values(spec, rows))
    if len(values) == 1:
        raise DataError(
            f"Training rows must carry at least two different labels. Received {values[0]!r} in all of them. Try rows "
            "of other labels too, or --label-field with another column."
        )
    if not values:
        columns = dict.fromkeys(("label", *spec.fields.get("label", ())))
        empty = next((column for column in columns if any(column in row.values for row in rows)), None)
        there = listed(sorted(rows[0].values)) if rows else "no rows"
        found = f"looked in {listed(list(columns))}, and the first row has {there}"
        if empty is not None:
            found = f"`{empty}` is empty (or NaN) in every row"
        raise DataError(
            f"Training rows must carry at least two different labels. Received none; {found}. "
            "Try --label-field with the column's name."
        )
    return values


def _form(section: TaskSection, model_kind: ModelKind) -> Form:
    if section.form == "verbalizer" and model_kind == "encoder":
        raise UnsupportedError(
            "`task.form` verbalizer needs a causal or masked model. Received an encoder, which predicts no words. "
            "Try --form head."
        )
    if section.form in ("auto", None):
        return "head" if model_kind == "encoder" else "verbalizer"
    return section.form


def _objective(section: TaskSection, model_kind: ModelKind, form: str, labels: int) -> Objective:
    in_words = form == "verbalizer" and model_kind == "causal"
    if section.objective == "answer" and not in_words:
        raise RecipeError(
            f"`task.objective` answer needs a causal model that answers in words. Received a {model_kind} model "
            f"and the form {form}. Try objective candidates."
        )
    if section.objective in ("auto", None):
        return "answer" if in_words and labels > MOST_CANDIDATES else "candidates"
    return section.objective


def _template(spec: TaskSpec, section: TaskSection, model_kind: ModelKind, form: str) -> tuple[str, str]:
    """The wording shown to this kind of model, and the recipe key it stands under."""
    if form == "head":
        return (spec.prompt, "task.prompt") if section.prompt is not None else (spec.text, "task.text")
    if model_kind != "masked":
        return spec.prompt, "task.prompt"
    own = section.masked_prompt is None and section.prompt is not None
    template = spec.prompt if own else spec.masked_prompt
    if template.count(MASK) != 1:
        raise RecipeError(
            f"A masked model needs `task.masked_prompt` with {MASK} once. Received {template!r}. "
            f'Try --set task.masked_prompt="{{{{ text }}}} It was {MASK}."'
        )
    return template, "task.masked_prompt"


def _order(values: Sequence[str]) -> Callable[[str], tuple[float, str]]:
    """By number if all are numbers, else by letters."""
    numeric = all(_is_number(value) for value in values)
    return lambda value: (float(value) if numeric else 0.0, value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_integer(text: str) -> bool:
    return text.lstrip("+-").isdecimal()
