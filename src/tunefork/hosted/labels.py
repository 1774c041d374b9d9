"""Probabilities of labels from what a hosted model tells about its answer: the likeliest tokens at each place."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

LEAST_MASS = 1e-3  # below this the alternatives say nothing about the labels


def label_shares(tokens: Sequence[Mapping[str, Any]], text: str, labels: Sequence[str]) -> tuple[list[float], float]:
    """(shares that sum to 1, probability that fell on any label) of an answer that was asked to be one of `labels`.

    `tokens` are those of the greedy answer with `logprob` and `top_logprobs`. At each place an alternative counts for
    the label that is the only one to begin as the text with it does; the answer itself is followed on while several
    still fit. What an alternative leaves open between labels is shared evenly among them. Case and a quote or space
    before the answer do not count. Without log-probabilities the label that the text names has all; where it names
    none, or several, the shares are even and the probability is 0.
    """
    folded = [_fold(label) for label in labels]
    shares = [0.0] * len(labels)
    path, said = 1.0, ""
    for token in tokens:
        others = [t for t in token.get("top_logprobs") or () if t["token"] != token["token"]]
        for other in others:
            _give(shares, folded, _fold(said + other["token"]), path * math.exp(other["logprob"]))
        path, said = path * math.exp(token["logprob"]), said + token["token"]
        fitting = _fitting(folded, _fold(said))
        if len(fitting) <= 1:
            break
    if tokens:
        _give(shares, folded, _fold(said), path)
    mass = sum(shares)
    if mass < LEAST_MASS:
        named = [i for i, label in enumerate(folded) if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", _fold(text))]
        if len(named) != 1:
            return [1 / len(labels)] * len(labels), 0.0
        return [float(i == named[0]) for i in range(len(labels))], 1.0
    return [share / mass for share in shares], min(1.0, mass)


def _give(shares: list[float], labels: Sequence[str], said: str, probability: float) -> None:
    fitting = _fitting(labels, said)
    if said in labels:  # `1` beside `10`: that is what was said so far
        fitting = [labels.index(said)]
    for i in fitting:
        shares[i] += probability / len(fitting)


def _fitting(labels: Sequence[str], said: str) -> list[int]:
    """Labels that begin so, or that this text begins with as a word."""
    return [
        i
        for i, label in enumerate(labels)
        if label.startswith(said) or (said.startswith(label) and not said[len(label)].isalnum())
    ]


def _fold(text: str) -> str:
    return text.lstrip(" \n\t\"'`*").casefold()
