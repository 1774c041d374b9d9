"""The cheap classifiers' parts: words are learned from train alone, features are put on one scale."""

from __future__ import annotations

import numpy as np
import pytest

from tunefork.evaluate.linear import classify, standardised, word_counts


def test_words_of_other_splits_are_unknown_and_one_letter_words_are_words() -> None:
    train, dev, empty = word_counts(["grade A", "grade B"], ["grade C grade A"], []) or []
    assert train.shape == (2, 5)  # grade, a, b, "grade a", "grade b"
    assert dev.shape == (1, 5) and dev.nnz == 3
    assert empty is None
    assert word_counts(["!?", ""]) is None


def test_features_are_scaled_by_train_alone() -> None:
    generator = np.random.default_rng(0)
    train = generator.normal(3.0, [0.01, 100.0], (200, 2)).astype(np.float32)
    scaled, other = standardised(train, train[:5] + np.float32(1))
    assert scaled.mean(0) == pytest.approx([0, 0], abs=1e-6) and scaled.std(0) == pytest.approx([1, 1])
    assert other - scaled[:5] == pytest.approx(np.tile(1 / train.std(0), (5, 1)), rel=1e-3)


@pytest.mark.parametrize("with_dev", [True, False])
def test_a_class_that_train_lacks_has_no_probability_and_the_best_c_is_kept(with_dev: bool) -> None:
    generator = np.random.default_rng(0)
    y = np.repeat([0, 2], 30)
    x = generator.normal(0, 1, (60, 3)) + y[:, None]
    tried: list[float] = []

    def score(probabilities: np.ndarray) -> float:
        tried.append(float(probabilities.max(1).mean()))
        return -tried[-1]  # the least sure is the best: the strongest regularisation

    found, note = classify(
        x, y, x if with_dev else None, x, n_classes=3, grid=(0.001, 1.0, 100.0), score=score, seed=0, check=lambda: None
    )
    assert found.shape == (60, 3) and not found[:, 1].any()
    assert found.sum(1) == pytest.approx(np.ones(60))
    if with_dev:
        assert len(tried) == 3 and tried[0] < tried[1] < tried[2]
        assert note.startswith("C=0.001") and float(found.max(1).mean()) == pytest.approx(tried[0])
    else:
        assert not tried and "fifth of train" in note
