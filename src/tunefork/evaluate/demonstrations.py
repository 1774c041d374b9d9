"""Answered rows of train put before a question: in-context learning, in the task's own words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tunefork.tasks.base import MASK, Example, Task

SEPARATOR = "\n\n"


def choose_demonstrations(
    task: Task, train: Sequence[Example], asked: Sequence[Example], count: int, seed: int
) -> list[Example]:
    """Up to `count` answered training rows, the same for every row asked, in a seeded order.

    Labels take turns (in a seeded order), so none is shown two times more often than another. A training row that
    asks the same as one of `asked` is never shown: its answer would be given away.
    """
    generator = np.random.Generator(np.random.PCG64([seed, 2]))
    given_away = {_normalised(example) for example in asked}
    usable = [e for e in train if _answer(e) is not None and _normalised(e) not in given_away]
    by_label: dict[int | None, list[Example]] = defaultdict(list)
    for i in generator.permutation(len(usable)):
        by_label[usable[i].gold if task.labels else None].append(usable[i])
    labels = sorted(by_label, key=lambda g: -1 if g is None else g)
    turns = [labels[i] for i in generator.permutation(len(labels))]
    chosen: list[Example] = []
    while len(chosen) < count and any(by_label.values()):
        for label in turns:
            if by_label[label] and len(chosen) < count:
                chosen.append(by_label[label].pop())
    return [chosen[i] for i in generator.permutation(len(chosen))]


def with_demonstrations(example: Example, demonstrations: Sequence[Example], *, masked: bool) -> Example:
    """The same question after answered ones, a blank line between any two.

    `masked`: the prompts hold a mask, and a demonstration has its answer in the mask's place.
    """
    return replace(example, prompt=SEPARATOR.join([*(_shown(d, masked) for d in demonstrations), example.prompt]))


def _shown(example: Example, masked: bool) -> str:
    answer = _answer(example) or ""
    return example.prompt.replace(MASK, answer.strip()) if masked else example.prompt + answer


def _answer(example: Example) -> str | None:
    if example.candidates:
        return None if example.gold is None else example.candidates[example.gold]
    return example.answer


def _normalised(example: Example) -> str:
    return " ".join((example.text or example.prompt).casefold().split())
