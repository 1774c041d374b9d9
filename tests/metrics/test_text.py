"""Text metrics: ROUGE equal to the reference package, SQuAD's rules by example, sentences and final numbers."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tunefork.errors import DataError
from tunefork.metrics import (
    exact_match,
    final_number,
    final_number_match,
    lead_n,
    normalise_answer,
    rouge_l,
    rouge_n,
    split_sentences,
    token_f1,
)

SCORER = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "The", "CAT.", "it's", "42", "caf\u00e9", "-", "running"]
words = st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join)
texts = st.one_of(words, st.text(max_size=40))

REAL = (
    "The school board voted on Tuesday to close three of its oldest buildings. Parents who had packed the hall booed.",
    "On Tuesday, the board voted 5-2 to close three old school buildings; parents booed the decision.",
    "Parents booed as the board voted to close schools, the oldest of which opened in 1911.",
)


def assert_equal_to_package(predicted: str, references: list[str]) -> None:
    expected = SCORER.score_multi(references, predicted)
    for name in expected:
        each = [rouge_l(predicted, r) if name == "rougeL" else rouge_n(predicted, r, int(name[-1])) for r in references]
        overlap = max(each, key=lambda o: o.f1)
        assert overlap.f1 == pytest.approx(expected[name].fmeasure, abs=1e-9)
        if len(references) == 1:
            assert overlap.precision == pytest.approx(expected[name].precision, abs=1e-9)
            assert overlap.recall == pytest.approx(expected[name].recall, abs=1e-9)


@settings(deadline=None)
@given(texts, texts)
@example("", "")
@example("a", "")
@example("a b", "b a")
@example("\u0130stanbul \u212alvin \u00df", "istanbul klvin ss")
def test_rouge_equal_to_rouge_score(predicted: str, reference: str) -> None:
    assert_equal_to_package(predicted, [reference])


@settings(deadline=None)
@given(words, st.lists(words, min_size=2, max_size=4))
def test_rouge_takes_the_best_reference(predicted: str, references: list[str]) -> None:
    assert_equal_to_package(predicted, references)


@pytest.mark.parametrize("predicted", REAL)
@pytest.mark.parametrize("reference", REAL)
def test_rouge_equal_on_real_sentences(predicted: str, reference: str) -> None:
    assert_equal_to_package(predicted, [reference])


@pytest.mark.shared
def test_rouge_equal_on_dialogue_summaries(shared: Path) -> None:
    with (shared / "data" / "dialogsum" / "dev.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(40), lines, strict=False)]
    for row in rows:
        assert_equal_to_package(lead_n(row["dialogue"], 3), [row["summary"]])
        assert_equal_to_package(row["dialogue"], [row["summary"]])


def test_rouge_parts() -> None:
    assert rouge_l("b a c", "a b c").f1 == pytest.approx(2 / 3)
    assert rouge_n("a b c d", "b c d e", 3).recall == pytest.approx(1 / 2)
    with pytest.raises(DataError, match="at least 1"):
        rouge_n("a", "a", 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("An apple, a day.", "apple day"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("a", ""),
        ("it's a-b", "its ab"),
    ],
)
def test_normalised_answer(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@settings(deadline=None)
@given(st.text(max_size=30))
def test_an_answer_matches_itself(text: str) -> None:
    assert exact_match(text, [text]) == token_f1(text, [text]) == 1


@settings(deadline=None)
@given(words, st.lists(words, min_size=1, max_size=3))
def test_exact_match_never_exceeds_f1(predicted: str, references: list[str]) -> None:
    assert exact_match(predicted, references) <= token_f1(predicted, references) <= 1
    assert token_f1(predicted, references) == max(token_f1(predicted, [reference]) for reference in references)


def test_answers_by_example() -> None:
    assert exact_match("the Normans.", ["Vikings", "Normans"]) == 1
    assert exact_match("Norman", ["Normans"]) == 0
    # 2 shared of 4 predicted and 3 gold tokens, a repeated word counted as often as both have it
    assert token_f1("in in northern France", ["in northern Spain"]) == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert token_f1("", ["Normans"]) == 0
    for metric in (exact_match, token_f1):
        with pytest.raises(DataError, match="references"):
            metric("x", [])
        with pytest.raises(DataError, match="references"):
            metric("x", "a bare string")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four.", ["One.", "Two!", "Three?", "Four."]),
        ("Mr. Smith met Dr. J. Doe at 3.5 km. He left.", ["Mr. Smith met Dr. J. Doe at 3.5 km.", "He left."]),
        ('She said "Go." Then she went.', ['She said "Go."', "Then she went."]),
        ("It cost $3.50 e.g. in the U.S. Army shop. Fine.", ["It cost $3.50 e.g. in the U.S. Army shop.", "Fine."]),
        ("No. I do. So do I. Good.", ["No.", "I do.", "So do I.", "Good."]),
        ("Really?! Yes... well. \u00c9lan.", ["Really?!", "Yes... well.", "\u00c9lan."]),
        ("#Person1#: Hi there\n#Person2#: Hello. Bye.\n\n", ["#Person1#: Hi there", "#Person2#: Hello.", "Bye."]),
        ("\u4eca\u65e5\u306f\u3002\u5143\u6c17\uff1f", ["\u4eca\u65e5\u306f\u3002", "\u5143\u6c17\uff1f"]),
        ("  ", []),
        ("no end", ["no end"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


@settings(deadline=None)
@given(st.text(alphabet="aA. !?\n'\"9\u3002", max_size=80))
def test_sentences_keep_every_character(text: str) -> None:
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_lead() -> None:
    assert lead_n("One. Two. Three. Four.", 3) == "One. Two. Three."
    assert lead_n("One.", 3) == "One."
    assert lead_n("", 3) == ""
    with pytest.raises(DataError, match="at least 1"):
        lead_n("One.", 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 16 - 3 = 13\n#### 18", Decimal(18)),
        ("#### 1,234,567", Decimal(1234567)),
        ("#### -$2.50.", Decimal("-2.5")),
        ("#### 7\nQ: more?\n#### 9", Decimal(7)),
        ("####.5", Decimal("0.5")),
        ("the answer is 18", None),
        ("#### none", None),
    ],
)
def test_final_number(text: str, expected: Decimal | None) -> None:
    assert final_number(text) == expected


def test_final_number_match() -> None:
    assert final_number_match("#### 18.00", ["work\n#### 18"]) == 1
    assert final_number_match("18", ["#### 18"]) == 0
    assert final_number_match("#### 19", ["#### 18"]) == 0
    with pytest.raises(DataError, match="####"):
        final_number_match("#### 18", ["18"])


def test_hostile_text_does_not_stall() -> None:
    # each takes milliseconds; a pattern that backtracks would take minutes
    assert split_sentences("." * 200_000) == ["." * 200_000]
    assert split_sentences("A. " * 30_000) == [("A. " * 30_000).strip()]
    assert final_number("####" + " " * 200_000) is None
    assert rouge_l("a b " * 2_000, "b a " * 2_000).f1 == pytest.approx(3999 / 4000)
