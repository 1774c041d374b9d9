"""Test rows to look at: gained and lost against a baseline, and answers beside their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunefork import words
from tunefork.evaluate.summary import Change
from tunefork.report.reading import Record
from tunefork.tasks import Prediction


@dataclass(frozen=True, slots=True)
class Shown:
    """A test row with what two systems, or one, said about it."""

    source: str  # file without its folders, and line
    text: str
    gold: str
    before: str
    after: str
    note: str = ""

    @property
    def short(self) -> bool:
        """Whether what was said fits side by side."""
        return max(map(len, (self.gold, self.before, self.after))) <= 24


def show_changes(record: Record, baseline: str, changes: Sequence[Change], most: int = 10) -> list[Shown]:
    """The first of `changes` with what the baseline and the run said; where nothing was said, the loss."""
    place = {p.source: i for i, p in enumerate(record.predictions)}
    shown = []
    for change in changes[:most]:
        i = place[change.source]
        mine, theirs = record.predictions[i], record.baselines[baseline][i]
        note = "" if mine.gold_index is not None or mine.golds else _by_how_much(record.metric, change.difference)
        shown.append(
            Shown(
                words.short_name(change.source),
                words.trimmed(record.texts[i]),
                _right(mine),
                _said(theirs),
                _said(mine),
                note,
            )
        )
    return shown


def _by_how_much(metric: str, better: float) -> str:
    sign = 1 if words.higher_is_better(metric) else -1
    return f"{words.metric_name(metric)} {words.decimal(sign * better, signed=True)}"


def show_samples(record: Record, most: int = 8) -> list[Shown]:
    """Answers beside their references, evenly spaced over the test rows; empty where no text was generated."""
    if record.task.form not in ("text", "chat") or not any(p.predicted for p in record.predictions):
        return []
    places = np.unique(np.linspace(0, len(record.predictions) - 1, most).round().astype(int))
    return [_sample(record.predictions[i], record.texts[i]) for i in map(int, places)]


def _sample(prediction: Prediction, text: str) -> Shown:
    notes = [
        "cut off at the longest length allowed" if prediction.stopped is False else "",
        f"{words.count(prediction.cut, 'prompt token')} left out to make room" if prediction.cut else "",
    ]
    said = words.trimmed(prediction.predicted, 400) or "(nothing)"
    note = "; ".join(filter(None, notes))
    return Shown(words.short_name(prediction.source), words.trimmed(text, 400), _right(prediction), "", said, note)


def _right(prediction: Prediction) -> str:
    right = prediction.gold if prediction.gold is not None else next(iter(prediction.references), None)
    return "(unknown)" if right is None else words.trimmed(right, 400)


def _said(prediction: Prediction) -> str:
    if prediction.predicted or prediction.loss is None:
        return words.trimmed(prediction.predicted, 400) or "(nothing)"
    return f"loss {words.decimal(prediction.loss)}"
