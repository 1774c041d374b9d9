"""From what the model gave for each row, on each side of each query, to the values whose differences are slopes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Measured:
    """fp64 [queries] losses on the two sides, the queries' shares of the weight, and what it cost."""

    first: np.ndarray
    second: np.ndarray
    shares: np.ndarray
    forwards: int  # rows (of a closure: batches) times evaluations
    by_row: Callable[[int], np.ndarray] | None  # [rows] of a query: each one's part in `first - second`, their mean
    here: float | None = None  # an objective's loss where the model stands, if it was looked at there


@dataclass(frozen=True, slots=True)
class Objective:
    """A value of a whole batch, to be raised: any function of the model's answers, whether it has a slope or not.

    Where each query sees its own rows only (`rows=split`), the value is that of the whole batch in which these rows
    are answered as the probe does and the others as the model stands. So a metric that is no mean over rows has its
    full size for every query, and the queries' slopes add up to the batch's.

    answers: (model, batch) -> an answer a row, of any kind.
    value: of a batch's answers, in the order of its rows; higher is better.
    mean: `value` is a mean over rows, so that some of them can be judged alone.
    stackable: `answers` is one pass over the rows as they stand, so that several sides can share it.
    """

    answers: Callable[[torch.nn.Module, Any], Sequence[Any]]
    value: Callable[[Sequence[Any]], float]
    mean: bool = False
    stackable: bool = True

    def loss(self, answers: Sequence[Any]) -> float:
        return -float(self.value(answers))


Lanes = Callable[[int, int], Sequence[Any]]
"""(query, sign) -> what was found there: one entry a row of the step's batch, those of the query's own rows filled."""


def of_losses(
    lanes: Lanes, signs: tuple[int, int], shares: Sequence[tuple[int, int]], weights: np.ndarray, split: bool
) -> tuple[np.ndarray, np.ndarray, Callable[[int], np.ndarray]]:
    """(sides [2, queries], shares of the weight [queries], by row) from row losses."""
    sides, part = np.zeros((2, len(shares))), np.full(len(shares), 1.0 / len(shares))
    sums = [float(weights[a:b].sum()) for a, b in shares]
    for j, (begin, end) in enumerate(shares):
        if sums[j]:
            sides[:, j] = np.array([lanes(j, sign)[begin:end] for sign in signs]).sum(axis=1) / sums[j]
        if split:
            part[j] = sums[j] / float(weights.sum())

    def by_row(j: int) -> np.ndarray:
        begin, end = shares[j]
        first, second = (np.array(lanes(j, sign)[begin:end]) for sign in signs)
        return (first - second) * ((end - begin) / sums[j] if sums[j] else 0.0)

    return sides, part, by_row


def of_answers(
    objective: Objective, lanes: Lanes, signs: tuple[int, int], shares: Sequence[tuple[int, int]], split: bool
) -> tuple[np.ndarray, np.ndarray, Callable[[int], np.ndarray]]:
    """(sides [2, queries], shares [queries], by row) from answers."""
    queries, rows = len(shares), shares[-1][1]
    sides, part = np.zeros((2, queries)), np.full(queries, 1.0 / queries)
    here = objective.loss(lanes(0, 0)) if split and not objective.mean else 0.0

    def whole(j: int, own: Sequence[Any]) -> list[Any]:
        """All rows' answers, those of query j from a probe."""
        begin, end = shares[j]
        around = lanes(0, 0) if split else own
        return [*around[:begin], *own, *around[end:]]

    def own(j: int, sign: int) -> Sequence[Any]:
        return lanes(j, sign)[slice(*shares[j])]

    for j, (begin, end) in enumerate(shares):
        for i, sign in enumerate(signs):
            if begin == end:
                sides[i, j], part[j] = here, 0.0
            elif objective.mean or not split:
                sides[i, j] = objective.loss(own(j, sign))
            else:  # as if all rows had moved as these did, which is what a mean over these rows says too
                sides[i, j] = here + queries * (objective.loss(whole(j, own(j, sign))) - here)
        if split and objective.mean:
            part[j] = (end - begin) / rows

    def by_row(j: int) -> np.ndarray:
        first, second = own(j, signs[0]), own(j, signs[1])
        if objective.mean:
            return np.array([objective.loss([a]) - objective.loss([b]) for a, b in zip(first, second, strict=True)])
        base = objective.loss(whole(j, second))
        moved = [[*second[:i], answer, *second[i + 1 :]] for i, answer in enumerate(first)]
        times = len(first) * (queries if split else 1)
        return np.array([times * (objective.loss(whole(j, m)) - base) for m in moved])

    return sides, part, by_row
