"""Logistic regression for the cheap baselines: on word counts, or on a frozen model's features. CPU, deterministic."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Score = Callable[[Floats], float]
"""Probabilities of the rows C is chosen on -> how good they are, higher is better."""

TFIDF_C = (1.0, 10.0, 100.0, 1000.0)
PROBE_C = (0.0001, 0.001, 0.01, 0.1, 1.0)
_HELD_OUT = 5  # without dev rows C is chosen on every fifth train row of a seeded order
_WORD = r"(?u)\b\w+\b"  # scikit-learn's default drops one-letter words, and with them grades and digits


def word_counts(train: Sequence[str], *others: Sequence[str]) -> list[Any] | None:
    """TF-IDF of word 1-grams and 2-grams, learned from `train` alone; None without words.

    One sparse matrix a split, or None for a split without rows.
    """
    if not any(re.search(_WORD, text) for text in train):
        return None
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=_WORD, sublinear_tf=True, dtype=np.float64)
    return [vectorizer.fit_transform(train), *(vectorizer.transform(texts) if texts else None for texts in others)]


def standardised(train: NDArray[np.float32], *others: NDArray[np.float32]) -> list[Floats]:
    """Zero mean and unit variance by column, as measured on `train`."""
    scaler = StandardScaler().fit(train.astype(np.float64))
    wide = [x.astype(np.float64) for x in (train, *others)]
    return [np.asarray(scaler.transform(x)) if len(x) else x for x in wide]


def classify(
    train_x: Any,
    train_y: Ints,
    dev_x: Any | None,
    test_x: Any,
    *,
    n_classes: int,
    grid: Sequence[float],
    score: Score,
    seed: int,
    check: Callable[[], None],
) -> tuple[Floats, str]:
    """Probabilities [test rows, n_classes], and how C (inverse L2 strength) was chosen.

    C is the best of `grid` by `score` on the dev rows, the smallest at a tie. Without dev rows it is chosen by
    accuracy on a seeded fifth of the training rows, and the final fit uses all of them.
    """
    if len(np.unique(train_y)) < 2:
        only = np.zeros((test_x.shape[0], n_classes))
        only[:, train_y[0]] = 1.0
        return only, "All training rows have the same label, so it always says that one."
    if dev_x is not None:
        fits = []
        for c in grid:
            check()
            model = _fit(train_x, train_y, c, seed)
            fits.append((score(_probabilities(model, dev_x, n_classes)), c, model))
        _, c, model = max(fits, key=lambda f: (f[0], -f[1]))
        return _probabilities(model, test_x, n_classes), f"C={c:g}, the best of {_listed(grid)} on dev."
    order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(len(train_y))
    held, kept = order[::_HELD_OUT], np.setdiff1d(order, order[::_HELD_OUT])
    if len(np.unique(train_y[kept])) < 2:
        c, why = grid[len(grid) // 2], "too few rows to choose it"
    else:
        tried = []
        for c in grid:
            check()
            guess = _probabilities(_fit(train_x[kept], train_y[kept], c, seed), train_x[held], n_classes).argmax(1)
            tried.append((float((guess == train_y[held]).mean()), -c))
        c, why = -max(tried)[1], f"the best of {_listed(grid)} on a fifth of train (there are no dev rows)"
    check()
    return _probabilities(_fit(train_x, train_y, c, seed), test_x, n_classes), f"C={c:g}, {why}."


def _fit(x: Any, y: Ints, c: float, seed: int) -> Any:
    model = LogisticRegression(C=c, max_iter=1000, tol=1e-4, random_state=seed)
    with threadpool_limits(1, user_api="blas"):  # the same sums on every machine, and ten times faster on a busy one
        return model.fit(x, y)


def _probabilities(model: Any, x: Any, n_classes: int) -> Floats:
    """Columns of classes that training never saw are zero."""
    full = np.zeros((x.shape[0], n_classes))
    full[:, model.classes_] = model.predict_proba(x)
    return full


def _listed(grid: Sequence[float]) -> str:
    return ", ".join(f"{c:g}" for c in grid)
