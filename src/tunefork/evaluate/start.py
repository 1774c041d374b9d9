"""A fresh classification head that starts from the linear probe.

With back-propagation the features are then not torn about by a random head's first gradients (Kumar et al., ICLR 2022,
arXiv 2202.10054); a zeroth-order method learns next to nothing from a random one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from threadpoolctl import threadpool_limits

from tunefork.errors import UnsupportedError
from tunefork.evaluate.batching import pack
from tunefork.evaluate.harness import Asking
from tunefork.evaluate.linear import PROBE_C, standardised
from tunefork.models import bare_model
from tunefork.render import Rendered
from tunefork.tasks.loss import row_scores

_UNSEEN = -10.0  # logit of a class without training rows


def start_head_from_probe(model: torch.nn.Module, asking: Asking, rows: Sequence[Rendered], seed: int) -> str:
    """Sets the head's last layer to a logistic regression on what it sees of `rows`; says with which C.

    Raises UnsupportedError where the head does not end in a linear layer.
    """
    rows = [row for row in rows if row.example.gold is not None]
    gold = np.array([row.example.gold for row in rows])
    layer = _last_layer(model)
    if len(set(gold)) < 2:
        return "The head starts as drawn: the training rows have one label."
    features = _seen(model, asking, rows, layer)
    mean, spread = features.mean(0), features.std(0)
    spread[spread == 0] = 1.0
    folds = min(3, min(np.bincount(gold)[np.unique(gold)]))
    with threadpool_limits(1, user_api="blas"):  # the same sums on every machine
        regression = LogisticRegression(max_iter=1000, random_state=seed)
        search = GridSearchCV(regression, {"C": PROBE_C}, cv=int(folds)) if folds > 1 else regression
        search.fit(standardised(features)[0], gold)
    found = search.best_estimator_ if isinstance(search, GridSearchCV) else search
    weight, bias = np.asarray(found.coef_), np.asarray(found.intercept_)
    if len(weight) == 1:  # of two classes scikit-learn keeps the difference
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / spread
    bias = bias - weight @ mean
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[found.classes_] = torch.tensor(weight).to(layer.weight)
        if layer.bias is not None:
            layer.bias.fill_(_UNSEEN)
            layer.bias[found.classes_] = torch.tensor(bias).to(layer.bias)
    return f"The head starts from a linear probe of {len(rows):,} rows (C={found.C:g})."


def _last_layer(model: torch.nn.Module) -> torch.nn.Linear:
    bare = bare_model(model)
    layers = [
        m
        for n, m in bare.named_modules()
        if isinstance(m, torch.nn.Linear) and n.split(".")[0] in ("classifier", "score")
    ]
    if not layers:
        raise UnsupportedError(
            f"A head that starts from the probe must end in a linear layer. Received {type(bare).__name__}. "
            "Try --set train.head_start=random."
        )
    return layers[-1]


def _seen(
    model: torch.nn.Module, asking: Asking, rows: Sequence[Rendered], layer: torch.nn.Linear
) -> NDArray[np.float32]:
    """[rows, features]: what the layer is given for each row; of a decoder at its last token."""
    given: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].detach()))
    found = np.empty((len(rows), layer.in_features), dtype=np.float32)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for group in pack([len(row.ids) for row in rows], asking.tokens_per_batch):
                asking.check()
                batch = asking.renderer.batch([rows[i] for i in group], learn=False).to(asking.device)
                given.clear()
                with asking.compute():
                    row_scores(model, batch)
                seen = given[-1]
                if seen.ndim == 3:
                    last = batch.attention_mask.sum(1) - 1
                    seen = seen[torch.arange(len(seen), device=seen.device), last]
                found[group] = seen.float().cpu().numpy()
    finally:
        handle.remove()
        model.train(was_training)
    return found
