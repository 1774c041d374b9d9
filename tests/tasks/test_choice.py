"""Choice: candidates of every shape, and which one is right."""

from typing import Any

import numpy as np
import pytest

from tests.tasks.rows import made, only, rows
from tunefork.errors import DataError, RecipeError
from tunefork.recipe.schema import DataSection
from tunefork.tasks import Prediction, build_examples

CHOICES = ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("right", "gold"), [(1, 1), ("1", 1), (1.0, 1), ("green", 1), ("B", 1), ("c", 2), (None, None), ("", None)]
)
def test_the_right_one_is_a_position_a_text_or_a_letter(right: Any, gold: int | None) -> None:
    example = only(made("choice"), {"question": "Colour?", "choices": CHOICES, "answer": right})
    assert example.gold == gold and example.prompt == "Colour?\nAnswer:"
    assert example.candidates == (" red", " green", " blue")


def test_texts_come_before_positions_and_names_before_both() -> None:
    digits = ["2", "1", "0"]
    assert only(made("choice"), {"question": "?", "choices": digits, "label": "1"}).gold == 1
    assert only(made("choice"), {"question": "?", "choices": digits, "label": "2"}).gold == 0
    assert only(made("choice"), {"question": "?", "choices": digits, "label": 2}).gold == 2
    arc = {"question": "?", "choices": {"text": CHOICES, "label": ["1", "2", "3"]}, "answerKey": "1"}
    assert only(made("choice"), arc).gold == 0


def test_choices_may_be_json_in_a_table_or_columns_of_their_own() -> None:
    row = {"question": "?", "choices": '["red", "green"]', "label": 0}
    assert only(made("choice"), row).candidates == (" red", " green")
    own = made("choice", choices=("{{ choice1 }}", "{{ choice2 }}"))
    assert only(own, {"question": "?", "choice1": "x", "choice2": "y", "label": 1}).candidates == (" x", " y")
    with pytest.raises(DataError, match=r"`choices` must list.*task\.choices"):
        only(made("choice"), {"question": "?", "choice1": "x", "label": 1})


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "?", "choices": ["red"], "label": 0}, "at least two"),
        ({"question": "?", "choices": ["red", "red", "blue"], "label": 2}, "differ.*'red'"),
        ({"question": "?", "choices": CHOICES, "label": 3}, "position from 0 to 2"),
        ({"question": "?", "choices": CHOICES, "label": "pink"}, "one of the choices.*'pink'"),
        ({"question": None, "choices": CHOICES, "label": 0}, "`question`"),
    ],
)
def test_rows_that_cannot_be_meant_are_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=r"(?s)a\.csv:2.*" + sentence):
        only(made("choice"), row)


def test_reading_positions_from_zero_is_said() -> None:
    train = rows(*[{"question": "?", "choices": CHOICES, "label": i % 3} for i in range(5)])
    _, (finding,) = build_examples(made("choice", train), train, DataSection(), labelled=True)
    assert finding.level == "info" and finding.count == 5 and "from 0" in finding.message
    spoken = rows({"question": "?", "choices": CHOICES, "label": "blue"})
    assert build_examples(made("choice", spoken), spoken, DataSection(), labelled=True)[1] == []


def test_the_objective_follows_how_many_candidates_there_are() -> None:
    many = rows({"question": "?", "choices": [f"number {i}" for i in range(9)], "label": 0})
    assert made("choice", many).objective == "answer"
    assert made("choice", rows({"question": "?", "choices": CHOICES, "label": 0})).objective == "candidates"
    assert made("choice", many, objective="candidates").objective == "candidates"


def test_any_right_candidate_counts() -> None:
    task = made("record")
    common: dict[str, Any] = {"source": "r", "predicted": "x", "gold": "y", "gold_index": 0}
    predictions = [Prediction(**common, index=2, golds=(0, 2)), Prediction(**common, index=1, golds=(0, 2))]
    (accuracy,) = task.statistics(predictions)
    assert accuracy(np.array([0, 1])) == 0.5 and accuracy(np.array([0])) == 1.0
    with pytest.raises(RecipeError, match=r"task\.metric"):
        made("copa", metric="f1")
    with pytest.raises(DataError, match="right answer"):
        task.statistics([Prediction("r", "x", None, index=1)])
