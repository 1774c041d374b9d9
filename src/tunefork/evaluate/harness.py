"""What a model says about rows: probabilities over candidates, generated text, or the loss of the right answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunefork.errors import DataError
from tunefork.evaluate.batching import choice_tokens, pack, text_tokens
from tunefork.evaluate.generate import Generated, answer_renderer, generate
from tunefork.evaluate.prefix import can_share_prefix, prefix_scores
from tunefork.render import Rendered, Renderer
from tunefork.tasks.base import Example, Prediction, Task
from tunefork.tasks.loss import Hits, normalised_scores, row_losses, row_scores

LOSS = "loss"
UNGENERATED = (LOSS, "stopped")  # no text is generated for these alone: chats are long


def nothing() -> None:
    """The check of a caller that cannot be interrupted."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked: its one way of rendering, which knows the task, and how forward passes are made."""

    renderer: Renderer
    device: torch.device
    tokens_per_batch: int  # padded tokens in a batch, at most; a single row may be longer
    check: Callable[[], None] = nothing  # called before every batch and at every generated token; may raise
    compute: Callable[[], AbstractContextManager[object]] = nullcontext  # the context of a forward pass (autocast)

    @property
    def task(self) -> Task:
        return self.renderer.task

    @property
    def passes(self) -> dict[str, Any]:
        """All but the renderer, by name."""
        return {name: getattr(self, name) for name in ("device", "tokens_per_batch", "check", "compute")}


def predict_examples(
    model: torch.nn.Module,
    asking: Asking,
    examples: Sequence[Example],
    *,
    rendered: Sequence[Rendered] | None = None,
    generated: bool | None = None,
    more_stops: Sequence[str] = (),
) -> list[Prediction]:
    """A prediction a row, in the order given; batched by length.

    Tasks with candidates give probabilities. Text and chat give the loss of the right answer (mean nats a trained
    token) where there is one, and greedy text where `generated` says so (None: where a metric other than `loss` and
    `stopped` needs it), which ends at the end token, the task's stop strings or `more_stops`.

    `rendered` saves rendering again: what `renderer.render` gave for these very examples, in any order. The model
    comes back in the mode it was in; no random state is touched.
    """
    task = asking.task
    if rendered is None:
        pieces = [(i, r) for i, example in enumerate(examples) for r in asking.renderer.render(example)]
    else:
        place = {id(example): i for i, example in enumerate(examples)}
        pieces = [(place[id(r.example)], r) for r in rendered]
    with _evaluating(model):
        if task.form not in ("text", "chat"):
            return _candidates(model, asking, examples, pieces)
        if generated is None:
            generated = any(metric not in UNGENERATED for metric in task.metrics)
        return _texts(model, asking, examples, pieces, generated, (*task.stop, *more_stops))


def mean_loss(model: torch.nn.Module, asking: Asking, rendered: Sequence[Rendered], hits: Hits | None = None) -> float:
    """The loss training minimises, over all rows: sum of row losses / sum of row weights (nats a token, or a row).

    Rows that teach nothing (no label, no trained token) are left out. Raises DataError when there are no others.
    """
    teaching = [r for r in rendered if r.example.gold is not None or any(r.trained[1:])]
    if not teaching:
        raise DataError("A loss needs at least one row with a known answer. Received none. Try a labelled file.")
    with _evaluating(model):
        pairs = _losses(model, asking, teaching, hits)
    return sum(loss for loss, _ in pairs) / sum(weight for _, weight in pairs)


def look_metrics(
    model: torch.nn.Module, asking: Asking, examples: Sequence[Example], rendered: Sequence[Rendered]
) -> tuple[str, float, bool, Mapping[str, float]]:
    """A look at dev during training: (choosing metric, its value, whether higher is better, all metrics).

    Candidates: the task's metrics. Text, chat and preference: the loss (lower is better), with how often the model was
    right beside it, unless the task's choosing metric is one of generated text. Rows without a right answer are left
    out. Raises DataError when there are no others.
    """
    task = asking.task
    if task.metric == LOSS:
        hits = Hits()
        loss = mean_loss(model, asking, rendered, hits)
        return LOSS, loss, False, {LOSS: loss, **hits.taken()}
    known = [e for e in examples if e.gold is not None or e.golds or e.references or e.answer or e.messages]
    if not known:
        raise DataError("A metric needs at least one row with a known answer. Received none. Try a labelled file.")
    wanted = {id(e) for e in known}
    predictions = predict_examples(model, asking, known, rendered=[r for r in rendered if id(r.example) in wanted])
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


def _candidates(
    model: torch.nn.Module, asking: Asking, examples: Sequence[Example], pieces: Sequence[tuple[int, Rendered]]
) -> list[Prediction]:
    rendered = dict(pieces)
    scores = _scores(model, asking, [rendered[i] for i in range(len(examples))])
    return [candidate_prediction(asking.task, e, np.exp(row)) for e, row in zip(examples, scores, strict=True)]


def _scores(model: torch.nn.Module, asking: Asking, rendered: Sequence[Rendered]) -> list[np.ndarray]:
    """Log-probabilities over each row's own candidates, or over the classes of a head."""
    share = any(r.fanned_out for r in rendered) and can_share_prefix(model)
    sharing = [i for i, r in enumerate(rendered) if share and r.fanned_out and r.ids]
    whole = sorted(set(range(len(rendered))) - set(sharing))
    found: dict[int, np.ndarray] = {}
    for rows in _groups(model, asking, [rendered[i] for i in whole], everywhere=False):
        asking.check()
        some = [whole[k] for k in rows]
        batch = asking.renderer.batch([rendered[i] for i in some]).to(asking.device)
        with asking.compute():
            scores = row_scores(model, batch).cpu().numpy()
        for i, row in zip(some, scores, strict=True):
            found[i] = row[: len(rendered[i].candidates) or None]
    prompts, candidates = [rendered[i].ids for i in sharing], [rendered[i].candidates for i in sharing]
    sums = prefix_scores(model, prompts, candidates, pad=asking.renderer.pad, **asking.passes)
    for i, row in zip(sharing, sums, strict=True):
        means = torch.tensor([total / len(c) for total, c in zip(row, rendered[i].candidates, strict=True)])
        found[i] = normalised_scores(means, torch.zeros(len(means), dtype=torch.int64), 1)[0].numpy()
    return [found[i] for i in range(len(rendered))]


def _texts(
    model: torch.nn.Module,
    asking: Asking,
    examples: Sequence[Example],
    pieces: Sequence[tuple[int, Rendered]],
    generated: bool,
    stops: Sequence[str],
) -> list[Prediction]:
    """Loss where the right answer is known, and text where it is asked for."""
    learned = [(i, r) for i, r in pieces if any(r.trained[1:])]  # several a chat whose template rewrites earlier turns
    sums = np.zeros((len(examples), 2))
    for (i, _), pair in zip(learned, _losses(model, asking, [r for _, r in learned]), strict=True):
        sums[i] += pair
    said: list[Generated | None] = [None] * len(examples)
    cuts = [0] * len(examples)
    if generated:
        renderer = answer_renderer(model, asking.renderer)
        prompts = [renderer.prompt(e) for e in examples]
        cuts = [p.cut for p in prompts]
        options = {"max_new_tokens": asking.task.max_new_tokens, "stop": stops, **asking.passes}
        said[:] = generate(model, asking.renderer, [p.ids for p in prompts], **options)
    return [
        Prediction(
            example.source,
            answer.text if answer is not None else "",
            right_answer(example),
            loss=float(loss / weight) if weight else None,
            stopped=answer.stopped if answer is not None else None,
            references=example.references,
            group=example.group,
            cut=cut,
        )
        for example, answer, (loss, weight), cut in zip(examples, said, sums, cuts, strict=True)
    ]


def right_answer(example: Example) -> str | None:
    """What a prediction of text is set beside, without the spaces that join it to its prompt."""
    if example.messages:
        return example.messages[-1].content if example.messages[-1].role == "assistant" else None
    return None if example.answer is None else example.answer.strip()


def _losses(
    model: torch.nn.Module, asking: Asking, rendered: Sequence[Rendered], hits: Hits | None = None
) -> list[tuple[float, float]]:
    """(summed loss, weight) of each."""
    found: list[tuple[float, float]] = [(0.0, 0.0)] * len(rendered)
    for group in _groups(model, asking, rendered, everywhere=True):
        asking.check()
        batch = asking.renderer.batch([rendered[k] for k in group], learn=True).to(asking.device)
        with asking.compute():
            losses = row_losses(model, batch, hits)
        for k, loss, weight in zip(group, losses.tolist(), batch.weights.tolist(), strict=True):
            found[k] = (loss, weight)
    return found


def _groups(model: torch.nn.Module, asking: Asking, rendered: Sequence[Rendered], everywhere: bool) -> list[list[int]]:
    """Batches of row numbers. Rows of one sequence and rows of several do not mix: a batch fans out all or none.

    `everywhere`: logits are asked for at every token, whatever the rows are.
    """
    groups: list[list[int]] = []
    for fanned in (False, True):
        rows = [i for i, r in enumerate(rendered) if r.fanned_out == fanned]
        where = (model, asking.device, asking.tokens_per_batch)
        some = [rendered[i] for i in rows]
        budget = text_tokens(*where) if everywhere else choice_tokens(*where, asking.renderer, some)
        fans = [len(rendered[i].candidates) if fanned else 1 for i in rows]
        packed = pack([rendered[i].longest for i in rows], budget, fans)
        groups += [[rows[k] for k in group] for group in packed]
    return groups


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
