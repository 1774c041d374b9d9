"""Metrics of classification from predicted and gold class indices, equal to scikit-learn's.

A class may be absent from the gold labels, from the predictions, or from both:
- precision of a class never predicted is 0, recall of a class never gold is 0, and F1 is 0 when either is;
- macro-F1 averages over the classes that occur in gold or predictions (scikit-learn's default), so a class that occurs
  in neither does not count and a class only ever predicted counts as 0;
- balanced accuracy averages recall over the classes that occur in gold.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tunefork.errors import DataError
from tunefork.metrics.arrays import Ints, integer_pair


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class's row of a classification report; `gold` and `predicted` count its rows."""

    precision: float
    recall: float
    f1: float
    gold: int
    predicted: int


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """For each class, arrays [n_classes]: rows that are right, gold and predicted."""

    right: Ints
    gold: Ints
    predicted: Ints

    def accuracy(self) -> float:
        return float(self.right.sum() / self.gold.sum())

    def macro_f1(self) -> float:
        rows = self.gold + self.predicted
        seen = rows > 0
        return float(np.mean(2 * self.right[seen] / rows[seen]))

    def balanced_accuracy(self) -> float:
        seen = self.gold > 0
        return float(np.mean(self.right[seen] / self.gold[seen]))

    def micro_f1(self, classes: Collection[int]) -> float:
        chosen = sorted(set(classes))
        rows = self.gold[chosen].sum() + self.predicted[chosen].sum()
        return float(2 * self.right[chosen].sum() / rows) if rows else 0.0


def class_counts(predicted: Ints, gold: Ints, n_classes: int) -> ClassCounts:
    """Counts in O(n + n_classes). Unchecked: indices must lie in 0..n_classes-1."""
    return ClassCounts(
        right=np.bincount(gold[predicted == gold], minlength=n_classes),
        gold=np.bincount(gold, minlength=n_classes),
        predicted=np.bincount(predicted, minlength=n_classes),
    )


def _counts(predicted: ArrayLike, gold: ArrayLike, n_classes: int | None = None) -> ClassCounts:
    p, g = integer_pair(predicted, gold, 0, None if n_classes is None else n_classes - 1)
    return class_counts(p, g, max(int(p.max()), int(g.max())) + 1 if n_classes is None else n_classes)


def accuracy(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Share of rows where the two agree. Arrays [n] of class indices; DataError for none, as everywhere here."""
    p, g = integer_pair(predicted, gold, 0)
    return np.count_nonzero(p == g) / len(g)


def macro_f1(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Mean F1 over the classes that occur in gold or predictions."""
    return _counts(predicted, gold).macro_f1()


def balanced_accuracy(predicted: ArrayLike, gold: ArrayLike) -> float:
    """Mean recall over the classes that occur in gold."""
    return _counts(predicted, gold).balanced_accuracy()


def micro_f1(predicted: ArrayLike, gold: ArrayLike, classes: Collection[int]) -> float:
    """F1 of the pooled counts of `classes`; 0 when none of them occurs.

    One class gives binary F1 (MultiRC's F1a, the positive class); all but an "other" class gives the usual micro-F1 of
    relation extraction. Over all classes it would equal accuracy.
    """
    p, g = integer_pair(predicted, gold, 0)
    if not classes or min(classes) < 0:
        raise DataError(f"`classes` must name class indices. Received {list(classes)}. Try [1] for the positive class.")
    return class_counts(p, g, int(max(p.max(), g.max(), *classes)) + 1).micro_f1(classes)


def confusion_matrix(predicted: ArrayLike, gold: ArrayLike, n_classes: int) -> Ints:
    """Counts [n_classes, n_classes]: rows are gold classes, columns predicted ones."""
    p, g = integer_pair(predicted, gold, 0, n_classes - 1)
    return np.bincount(g * n_classes + p, minlength=n_classes * n_classes).reshape(n_classes, n_classes)


def class_scores(predicted: ArrayLike, gold: ArrayLike, n_classes: int) -> list[ClassScore]:
    """Precision, recall and F1 of each class in order, also of those that do not occur (all 0)."""
    counts = _counts(predicted, gold, n_classes)
    scores: list[ClassScore] = []
    for right, in_gold, in_predicted in zip(
        counts.right.tolist(), counts.gold.tolist(), counts.predicted.tolist(), strict=True
    ):
        scores.append(
            ClassScore(
                precision=right / in_predicted if in_predicted else 0.0,
                recall=right / in_gold if in_gold else 0.0,
                f1=2 * right / (in_gold + in_predicted) if right else 0.0,
                gold=in_gold,
                predicted=in_predicted,
            )
        )
    return scores
