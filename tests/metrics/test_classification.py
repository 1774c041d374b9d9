"""Classification metrics: equal to scikit-learn's, also where classes are missing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from tunefork.errors import DataError
from tunefork.metrics import accuracy, balanced_accuracy, class_scores, confusion_matrix, macro_f1, micro_f1

N_CLASSES = 5
pairs = st.lists(st.tuples(st.integers(0, N_CLASSES - 1), st.integers(0, N_CLASSES - 1)), min_size=1, max_size=60)


@settings(deadline=None)
@given(pairs)
def test_equal_to_sklearn(rows: list[tuple[int, int]]) -> None:
    predicted, gold = map(list, zip(*rows, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of missing classes
        assert accuracy(predicted, gold) == pytest.approx(sk.accuracy_score(gold, predicted), abs=1e-12)
        assert macro_f1(predicted, gold) == pytest.approx(sk.f1_score(gold, predicted, average="macro"), abs=1e-12)
        assert balanced_accuracy(predicted, gold) == pytest.approx(
            sk.balanced_accuracy_score(gold, predicted), abs=1e-12
        )
        labels = list(range(N_CLASSES))
        assert (
            confusion_matrix(predicted, gold, N_CLASSES) == sk.confusion_matrix(gold, predicted, labels=labels)
        ).all()
        expected = sk.precision_recall_fscore_support(gold, predicted, labels=labels)
    scores = class_scores(predicted, gold, N_CLASSES)
    ours = np.array([(score.precision, score.recall, score.f1, score.gold) for score in scores]).T
    assert ours == pytest.approx(np.array(expected), abs=1e-12)
    assert sum(score.predicted for score in scores) == len(rows)


@settings(deadline=None)
@given(pairs, st.sets(st.integers(0, N_CLASSES - 1), min_size=1))
def test_micro_f1_equal_to_sklearn(rows: list[tuple[int, int]], classes: set[int]) -> None:
    predicted, gold = map(list, zip(*rows, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns when none of the classes occurs
        expected = sk.f1_score(gold, predicted, labels=sorted(classes), average="micro")
    assert micro_f1(predicted, gold, classes) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(pairs)
def test_micro_f1_of_all_classes_is_accuracy(rows: list[tuple[int, int]]) -> None:
    predicted, gold = map(list, zip(*rows, strict=True))
    assert micro_f1(predicted, gold, range(N_CLASSES)) == pytest.approx(accuracy(predicted, gold), abs=1e-12)


def test_absent_classes_as_documented() -> None:
    # class 2 only predicted: counts as 0 in macro-F1, does not enter balanced accuracy; class 3 nowhere: counts nowhere
    assert macro_f1([0, 1, 2], [0, 1, 1]) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert balanced_accuracy([0, 1, 2], [0, 1, 1]) == pytest.approx((1 + 1 / 2) / 2)
    assert class_scores([0, 1, 2], [0, 1, 1], 4)[3].f1 == 0
    assert micro_f1([0, 0], [0, 0], [1]) == 0


@pytest.mark.parametrize(
    ("predicted", "gold", "says"),
    [
        ([], [], "at least one"),
        ([0, 1], [0], "same rows"),
        ([0, -1], [0, 1], "Received -1"),
        ([0.5, 1.0], [0, 1], "integers"),
        ([[0, 1]], [0, 1], "shape"),
        (["a"], ["b"], "integers"),
    ],
)
def test_refused(predicted: list, gold: list, says: str) -> None:
    for metric in (accuracy, macro_f1, balanced_accuracy):
        with pytest.raises(DataError, match=says):
            metric(predicted, gold)


def test_index_beyond_the_classes_is_refused() -> None:
    with pytest.raises(DataError, match="Received 3"):
        confusion_matrix([0, 3], [0, 1], 3)
    with pytest.raises(DataError, match="Received 3"):
        class_scores([0, 1], [0, 3], 3)
    with pytest.raises(DataError, match="classes"):
        micro_f1([0], [0], [])


def test_accepts_any_integer_array() -> None:
    predicted, gold = np.array([1, 0, 1], dtype=np.uint8), np.array([True, False, False])
    assert accuracy(predicted, gold) == pytest.approx(2 / 3)
