"""Label probabilities from the alternatives of each token."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tunefork.hosted.labels import label_shares


def place(*alternatives: tuple[str, float]) -> dict[str, Any]:
    """A token of the answer, which is the first, with its alternatives and their probabilities."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in alternatives]
    return {**top[0], "top_logprobs": top}


def test_one_token_a_label() -> None:
    shares, mass = label_shares([place(("great", 0.6), ("bad", 0.2), ("the", 0.1))], "great", ["bad", "great"])
    assert shares == pytest.approx([0.25, 0.75])
    assert mass == pytest.approx(0.8)


def test_spellings_of_one_label_count_together() -> None:
    tokens = [place((" Great", 0.3), ("great", 0.3), ("bad", 0.2))]
    assert label_shares(tokens, " Great", ["bad", "great"])[0] == pytest.approx([0.25, 0.75])


def test_a_label_of_several_tokens_is_decided_where_it_differs() -> None:
    tokens = [place(("partially", 0.9), ("incorrect", 0.1)), place((" correct", 0.7), (" wrong", 0.3))]
    shares, mass = label_shares(tokens, "partially correct", ["partially correct", "partially wrong", "incorrect"])
    assert shares == pytest.approx([0.63, 0.27, 0.1])
    assert mass == pytest.approx(1)


def test_a_number_that_begins_another() -> None:
    tokens = [place(("1", 0.8), ("10", 0.1), ("0", 0.1))]
    assert label_shares(tokens, "1", ["0", "1", "10"])[0] == pytest.approx([0.1, 0.8, 0.1])
    tokens = [place(("1", 0.9), ("0", 0.1)), place(("0", 0.75), (".", 0.25))]
    assert label_shares(tokens, "10", ["0", "1", "10"])[0] == pytest.approx([0.1, 0.225, 0.675])


def test_an_open_alternative_is_shared_evenly() -> None:
    tokens = [place(("no", 0.6), ("partially", 0.4))]
    assert label_shares(tokens, "no", ["partially a", "partially b", "no"])[0] == pytest.approx([0.2, 0.2, 0.6])


def test_what_comes_after_the_label_does_not_count() -> None:
    tokens = [place(("2", 0.9), ("3", 0.1)), place((".", 0.5), ("5", 0.5))]
    assert label_shares(tokens, "2.", ["2", "3"])[0] == pytest.approx([0.9, 0.1])


def test_without_logprobs_the_text_decides() -> None:
    assert label_shares([], "It is Positive.", ["negative", "positive"]) == ([0.0, 1.0], 1.0)
    assert label_shares([], "unpositive", ["negative", "positive"]) == ([0.5, 0.5], 0.0)
    assert label_shares([], "negative or positive", ["negative", "positive"]) == ([0.5, 0.5], 0.0)


def test_an_answer_beside_the_labels_is_read() -> None:
    tokens = [place(("The", 1.0)), place((" answer", 1.0))]
    assert label_shares(tokens, "The answer is 3", ["2", "3"]) == ([0.0, 1.0], 1.0)
    assert label_shares(tokens, "The answer is long", ["2", "3"]) == ([0.5, 0.5], 0.0)
