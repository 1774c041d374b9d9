"""Figures: every metric with its interval and rows, differences in pairs, rows gained and lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.evaluate.scenes import reviews, rows
from tunefork.errors import DataError
from tunefork.evaluate.summary import compare_predictions, gained_lost, measure
from tunefork.recipe.schema import DataSection, EvaluateSection, TaskSection
from tunefork.tasks import Prediction, Task, make_task

SECTION = EvaluateSection(bootstrap=300)


def classify() -> Task:
    return make_task(TaskSection(name="classification"), DataSection(), "causal", reviews())


def predictions(said: Sequence[int], gold: Sequence[int]) -> list[Prediction]:
    names = ("bad", "good")
    return [
        Prediction(f"test.csv:{i}", names[p], names[g], index=p, gold_index=g)
        for i, (p, g) in enumerate(zip(said, gold, strict=True))
    ]


GOLD = [i % 2 for i in range(40)]
GOOD = [g if i % 8 else 1 - g for i, g in enumerate(GOLD)]
POOR = [g if i % 3 else 1 - g for i, g in enumerate(GOLD)]


def test_every_metric_has_an_interval_and_rows() -> None:
    task = classify()
    found = measure(task, predictions(GOOD, GOLD), SECTION, seed=0)
    assert list(found) == list(task.metrics)
    assert found["accuracy"]["value"] == 35 / 40
    for value in found.values():
        assert value["low"] < value["value"] < value["high"]
        assert value["n"] == 40
    assert found == measure(task, predictions(GOOD, GOLD), SECTION, seed=0)


def test_a_wider_confidence_is_a_wider_interval_and_groups_count_as_one() -> None:
    task = classify()
    plain = measure(task, predictions(GOOD, GOLD), SECTION, seed=0)["accuracy"]
    wide = measure(task, predictions(GOOD, GOLD), EvaluateSection(bootstrap=300, confidence=0.99), seed=0)["accuracy"]
    assert wide["high"] - wide["low"] > plain["high"] - plain["low"]
    grouped = [replace(p, group=f"essay {i // 8}") for i, p in enumerate(predictions(GOOD, GOLD))]
    assert measure(task, grouped, SECTION, seed=0)["accuracy"] != plain


def test_rows_without_an_answer_are_not_counted() -> None:
    unlabelled = Prediction("test.csv:99", "good", None, index=1)
    found = measure(classify(), [*predictions(GOOD, GOLD), unlabelled], SECTION, seed=0)
    assert found["accuracy"]["n"] == 40
    assert measure(classify(), [unlabelled], SECTION, seed=0) == {}
    assert measure(classify(), [], SECTION, seed=0) == {}


def test_a_loss_that_is_not_known_is_not_zero() -> None:
    given = rows([{"prompt": "Say", "answer": "no"}])
    task = make_task(TaskSection(name="generation"), DataSection(), "causal", given)
    known = Prediction("a:1", "no", "no", references=("no",), loss=2.0)
    unknown = Prediction("a:2", "yes", "no", references=("no",))
    found = measure(task, [known, unknown], SECTION, seed=0)
    assert found["loss"]["value"] == 2.0 and found["loss"]["n"] == 1
    assert found["f1"]["value"] == 0.5 and found["f1"]["n"] == 2
    assert "loss" not in measure(task, [unknown], SECTION, seed=0)
    assert "loss" not in compare_predictions(task, [unknown], [replace(unknown, loss=1.0)], SECTION, seed=0)


def test_two_systems_are_compared_on_the_same_rows() -> None:
    task = classify()
    good, poor = predictions(GOOD, GOLD), predictions(POOR, GOLD)
    found = compare_predictions(task, good, poor, SECTION, seed=0)["accuracy"]
    right = [a == g for a, g in zip(GOOD, GOLD, strict=True)], [b == g for b, g in zip(POOR, GOLD, strict=True)]
    assert found.difference == pytest.approx((sum(right[0]) - sum(right[1])) / 40)
    assert found.low <= found.difference <= found.high and found.n == 40
    back = compare_predictions(task, poor, good, SECTION, seed=0)["accuracy"]
    assert back.difference == pytest.approx(-found.difference)
    assert compare_predictions(task, good, good, SECTION, seed=0)["accuracy"].p_value == 1.0


@pytest.mark.parametrize("change", ["fewer", "order", "gold"])
def test_other_rows_are_refused(change: str) -> None:
    a = predictions(GOOD, GOLD)
    b = {"fewer": a[1:], "order": a[::-1], "gold": [replace(a[0], gold="no such"), *a[1:]]}[change]
    with pytest.raises(DataError, match="same rows"):
        compare_predictions(classify(), a, b, SECTION, seed=0)
    with pytest.raises(DataError, match="same rows"):
        gained_lost(classify(), a, b)


def test_rows_gained_and_lost() -> None:
    gained, lost = gained_lost(classify(), predictions(POOR, GOLD), predictions(GOOD, GOLD))
    better = [i for i in range(40) if POOR[i] != GOLD[i] and GOOD[i] == GOLD[i]]
    worse = [i for i in range(40) if POOR[i] == GOLD[i] and GOOD[i] != GOLD[i]]
    assert [c.source for c in gained] == [f"test.csv:{i}" for i in better]
    assert [c.source for c in lost] == [f"test.csv:{i}" for i in worse]
    assert all(c.after == c.gold != c.before for c in gained)


def test_any_of_several_right_candidates_counts() -> None:
    row = Prediction("a:1", "x", "x", index=0, gold_index=0, golds=(0, 2))
    gained, lost = gained_lost(
        classify(), [replace(row, index=1, predicted="y")], [replace(row, index=2, predicted="z")]
    )
    assert (len(gained), lost) == (1, [])


def test_texts_are_gained_by_the_choosing_metric_whichever_way_is_better() -> None:
    given = rows([{"prompt": "Say", "answer": "no"}])
    task = make_task(TaskSection(name="generation", metric="loss"), DataSection(), "causal", given)
    before = [Prediction(f"a:{i}", "", "no", references=("no",), loss=loss) for i, loss in enumerate((2.0, 1.0, 3.0))]
    after = [replace(p, loss=loss) for p, loss in zip(before, (1.5, 1.5, 0.5), strict=True)]
    gained, lost = gained_lost(task, before, after)
    assert [(c.source, c.difference) for c in gained] == [("a:2", 2.5), ("a:0", 0.5)]
    assert [c.source for c in lost] == ["a:1"]
