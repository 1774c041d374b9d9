"""What a model says about rows: probabilities over candidates, generated text, or the loss of the right answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunefork.evaluate.batching import pack
from tunefork.evaluate.generate import generate
from tunefork.evaluate.prefix import can_share_prefix, prefix_scores
from tunefork.render import Rendered, Renderer
from tunefork.tasks import Example, Prediction, Task, row_losses, row_scores

LOSS = "loss"


def nothing() -> None:
    """The check of a caller that cannot be interrupted."""


@dataclass(frozen=True)
class _Pass:
    """How forward passes are made."""

    model: torch.nn.Module
    renderer: Renderer
    device: torch.device
    tokens_per_batch: int
    check: Callable[[], None]
    compute: Callable[[], AbstractContextManager[object]]


def predict_examples(
    model: torch.nn.Module,
    task: Task,
    renderer: Renderer,
    examples: Sequence[Example],
    *,
    device: torch.device,
    tokens_per_batch: int,
    check: Callable[[], None] = nothing,
    compute: Callable[[], AbstractContextManager[object]] = nullcontext,
    generated: bool | None = None,
    more_stops: Sequence[str] = (),
) -> list[Prediction]:
    """A prediction a row, in the order given; batched by length, `tokens_per_batch` padded tokens at most.

    Tasks with candidates give probabilities. Text and chat give the loss of the right answer (mean nats a trained
    token) where there is one, and greedy text where `generated` says so (None: where a metric needs it), which ends
    at the task's stop strings or `more_stops`. `check` is called before every batch, and at every generated token;
    what it raises comes through. `compute` is the context of each forward pass (autocast). The model comes back in
    the mode it was in; no random state is touched.
    """
    now = _Pass(model, renderer, device, tokens_per_batch, check, compute)
    with _evaluating(model):
        if task.form not in ("text", "chat"):
            return _candidates(now, task, examples)
        if generated is None:
            generated = any(not m.startswith(LOSS) for m in task.metrics)
        return _texts(now, task, examples, generated, (*task.stop, *more_stops))


def mean_loss(
    model: torch.nn.Module,
    renderer: Renderer,
    rendered: Sequence[Rendered],
    *,
    device: torch.device,
    tokens_per_batch: int,
    check: Callable[[], None] = nothing,
    compute: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """The loss training minimises, over all rows: sum of row losses / sum of row weights (nats a token, or a row)."""
    now = _Pass(model, renderer, device, tokens_per_batch, check, compute)
    with _evaluating(model):
        pairs = _losses(now, rendered)
    return sum(loss for loss, _ in pairs) / max(sum(weight for _, weight in pairs), 1e-12)


def look_metrics(
    model: torch.nn.Module,
    task: Task,
    renderer: Renderer,
    examples: Sequence[Example],
    rendered: Sequence[Rendered],
    *,
    device: torch.device,
    tokens_per_batch: int,
    check: Callable[[], None] = nothing,
    compute: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[str, float, bool, Mapping[str, float]]:
    """A look at dev during training: (choosing metric, its value, whether higher is better, all metrics).

    Candidates: the task's metrics. Text and chat: the loss (lower is better), unless the task's choosing metric is
    one of generated text.
    """
    how: dict[str, Any] = {
        "device": device,
        "tokens_per_batch": tokens_per_batch,
        "check": check,
        "compute": compute,
    }
    if task.form in ("text", "chat") and task.metric.startswith(LOSS):
        loss = mean_loss(model, renderer, rendered, **how)
        return LOSS, loss, False, {LOSS: loss}
    predictions = predict_examples(model, task, renderer, examples, **how)
    rows = np.arange(len(predictions))
    statistics = task.statistics(predictions)
    values = {s.name: s(rows) for s in statistics}
    return statistics[0].name, values[statistics[0].name], statistics[0].higher_is_better, values


def candidate_prediction(task: Task, example: Example, probabilities: Sequence[float] | np.ndarray) -> Prediction:
    """The most probable candidate (the first at a tie), by label name where the task has labels."""
    names = task.labels or tuple(c.strip() for c in example.candidates)
    shares = tuple(float(p) for p in probabilities[: len(names)])
    best = int(np.argmax(shares))
    return Prediction(
        example.source,
        names[best],
        None if example.gold is None else names[example.gold],
        index=best,
        gold_index=example.gold,
        probabilities=shares,
        golds=example.golds,
        references=example.references,
        group=example.group,
    )


def _candidates(now: _Pass, task: Task, examples: Sequence[Example]) -> list[Prediction]:
    rendered = [now.renderer.render(example)[0] for example in examples]
    log_probabilities = _scores(now, rendered)
    return [
        candidate_prediction(task, example, np.exp(scores))
        for example, scores in zip(examples, log_probabilities, strict=True)
    ]


def _scores(now: _Pass, rendered: Sequence[Rendered]) -> list[np.ndarray]:
    """Log-probabilities over each row's own candidates."""
    spread = [i for i, r in enumerate(rendered) if r.fanned_out]
    share = bool(spread) and can_share_prefix(now.model)
    whole = [i for i in range(len(rendered)) if not (share and rendered[i].fanned_out)]
    found: list[np.ndarray | None] = [None] * len(rendered)
    lengths = [rendered[i].longest for i in whole]
    fans = [len(rendered[i].candidates) if rendered[i].fanned_out else 1 for i in whole]
    for group in pack(lengths, now.tokens_per_batch, fans):
        now.check()
        batch = now.renderer.batch([rendered[whole[k]] for k in group]).to(now.device)
        with now.compute():
            scores = row_scores(now.model, batch).cpu().numpy()
        for k, row in zip(group, scores, strict=True):
            found[whole[k]] = row[: len(rendered[whole[k]].candidates) or None]
    if share:
        sums = prefix_scores(
            now.model,
            [rendered[i].ids for i in spread],
            [rendered[i].candidates for i in spread],
            pad=now.renderer.pad,
            device=now.device,
            tokens_per_batch=now.tokens_per_batch,
            compute=now.compute,
            check=now.check,
        )
        for i, row in zip(spread, sums, strict=True):
            found[i] = normalise(row, rendered[i])
    return [f for f in found if f is not None]


def _texts(
    now: _Pass, task: Task, examples: Sequence[Example], generated: bool, stops: Sequence[str]
) -> list[Prediction]:
    """Loss where the right answer is known, and text where it is asked for."""
    pieces: list[Rendered] = []
    owner: list[int] = []
    for i, example in enumerate(examples):
        for part in now.renderer.render(example):  # several where a template rewrites earlier turns
            if any(part.trained):
                pieces.append(part)
                owner.append(i)
    sums = np.zeros((len(examples), 2))
    for i, (loss, weight) in zip(owner, _losses(now, pieces), strict=True):
        sums[i] += loss, weight
    said = [None] * len(examples)
    if generated:
        said = generate(
            now.model,
            now.renderer.tokenizer,
            [now.renderer.prompt(example).ids for example in examples],
            max_new_tokens=task.max_new_tokens,
            stop=stops,
            device=now.device,
            tokens_per_batch=now.tokens_per_batch,
            compute=now.compute,
            check=now.check,
        )
    return [
        Prediction(
            example.source,
            answer.text if answer is not None else "",
            _right(example),
            loss=float(loss / weight) if weight else None,
            stopped=answer.stopped if answer is not None else None,
            references=example.references,
            group=example.group,
        )
        for example, answer, (loss, weight) in zip(examples, said, sums, strict=True)
    ]


def _right(example: Example) -> str | None:
    if example.messages:
        return example.messages[-1].content if example.messages[-1].role == "assistant" else None
    return None if example.answer is None else example.answer.strip()


def _losses(now: _Pass, rendered: Sequence[Rendered]) -> list[tuple[float, float]]:
    """(summed loss, weight) of each."""
    found: list[tuple[float, float]] = [(0.0, 0.0)] * len(rendered)
    for group in pack([len(r.ids) for r in rendered], now.tokens_per_batch):
        now.check()
        batch = now.renderer.batch([rendered[k] for k in group]).to(now.device)
        with now.compute():
            losses = row_losses(now.model, batch)
        for k, loss, weight in zip(group, losses.tolist(), batch.weights.tolist(), strict=True):
            found[k] = (loss, weight)
    return found


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off, no gradients; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
