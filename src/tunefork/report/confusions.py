"""Where a classifier goes wrong: which classes it takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunefork import words
from tunefork.metrics import class_scores, confusion_matrix
from tunefork.report.reading import Record

MOST_CLASSES = 12
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Cell:
    """Rows of one class that were given one label."""

    rows: int
    share: float  # of the rows of the class
    said: str
    right: bool


@dataclass(frozen=True, slots=True)
class ClassLine:
    """One class: its scores, and its row of the matrix (empty where there are too many classes)."""

    name: str
    precision: float
    recall: float
    f1: float
    rows: int
    predicted: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Mistake:
    """Rows of `gold` that were called `predicted`."""

    gold: str
    predicted: str
    rows: int
    share: float  # of the rows of `gold`


@dataclass(frozen=True, slots=True)
class Confusions:
    """`classes` in the task's order and complete when `whole`; else those with the lowest F1, worst first."""

    classes: Sequence[ClassLine]
    mistakes: Sequence[Mistake]  # most rows first
    whole: bool
    n_classes: int
    right: int
    n: int


def find_confusions(record: Record) -> Confusions | None:
    """None for tasks without a fixed set of labels, and without labelled test rows."""
    known = [(p.gold_index, p.index) for p in record.predictions if p.gold_index is not None and p.index is not None]
    if not record.task.labels or not known:
        return None
    gold, predicted = (np.array(column) for column in zip(*known, strict=True))
    n = len(record.task.labels)
    matrix = confusion_matrix(predicted, gold, n)
    whole = n <= MOST_CLASSES
    totals = matrix.sum(axis=1)
    lines = [
        ClassLine(
            name,
            score.precision,
            score.recall,
            score.f1,
            score.gold,
            score.predicted,
            _cells(matrix[i].tolist(), i, score.gold) if whole else (),
        )
        for i, (name, score) in enumerate(zip(record.task.labels, class_scores(predicted, gold, n), strict=True))
    ]
    if not whole:
        lines = sorted((line for line in lines if line.rows), key=lambda line: (line.f1, -line.rows))[:_LISTED]
    pairs = sorted(((int(matrix[i, j]), i, j) for i, j in np.argwhere(matrix) if i != j), key=lambda m: (-m[0], *m[1:]))
    mistakes = [
        Mistake(record.task.labels[i], record.task.labels[j], rows, rows / int(totals[i]))
        for rows, i, j in pairs[:_LISTED]
    ]
    return Confusions(lines, mistakes, whole, n, int(np.trace(matrix)), int(matrix.sum()))


def _cells(counts: Sequence[int], own: int, total: int) -> tuple[Cell, ...]:
    shares = [rows / total if total else 0.0 for rows in counts]
    return tuple(
        Cell(rows, share, words.percent(share), j == own)
        for j, (rows, share) in enumerate(zip(counts, shares, strict=True))
    )
