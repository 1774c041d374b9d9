"""What any fine-tuned model must beat, on the same rows: from always saying one label to the untrained model itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tunefork.errors import DataError, UnsupportedError, did_you_mean
from tunefork.evaluate import linear
from tunefork.evaluate.demonstrations import SEPARATOR, choose_demonstrations, with_demonstrations
from tunefork.evaluate.features import frozen_features, text_ids
from tunefork.evaluate.generate import answer_renderer
from tunefork.evaluate.harness import Asking, candidate_prediction, predict_examples, right_answer
from tunefork.evaluate.summary import Value, measure
from tunefork.metrics import lead_n
from tunefork.recipe.schema import EvaluateSection
from tunefork.render import Rendered, Renderer
from tunefork.tasks.base import Example, Prediction, Task
from tunefork.tasks.build import item_text

Says = tuple[list[Prediction], list[str]]
"""Predictions in the order of the rows, and notes."""


@dataclass(frozen=True, slots=True)
class BaselineInfo:
    """A baseline as the registry lists it."""

    name: str
    summary: str
    forms: tuple[str, ...]  # of tasks it fits
    needs_model: bool
    metric: str = ""  # it fits only tasks that have a metric whose name starts so


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """What a baseline said about the test rows, and what that cost."""

    predictions: Sequence[Prediction]
    metrics: Mapping[str, Value]
    seconds: float
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True)
class _Inputs:
    task: Task
    given: Asking | None  # None where no model is asked
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    model: Callable[[], torch.nn.Module]
    section: EvaluateSection
    seed: int

    @property
    def asking(self) -> Asking:
        if self.given is None:
            raise UnsupportedError(f"A model must be there to be asked. Received none for {self.task.info.name}.")
        return self.given

    def check(self) -> None:
        if self.given is not None:
            self.given.check()


def list_baselines() -> list[BaselineInfo]:
    """Every baseline, cheapest first."""
    return [info for info, _ in _REGISTRY.values()]


def fitting_baselines(task: Task) -> tuple[str, ...]:
    """Names of the baselines that fit the task, cheapest first."""
    return tuple(info.name for info in list_baselines() if _misfit(info, task) is None)


def check_baselines(names: Sequence[str], task: Task) -> None:
    """Raises UnsupportedError for the first name that is unknown or does not fit the task. Loads nothing."""
    for name in names:
        if name not in _REGISTRY:
            raise UnsupportedError(
                f"`evaluate.baselines` must be among {', '.join(_REGISTRY)}. Received {name!r}."
                + did_you_mean(name, _REGISTRY)
            )
        misfit = _misfit(_REGISTRY[name][0], task)
        if misfit is not None:
            others = ", ".join(fitting_baselines(task)) or "none"
            raise UnsupportedError(f"Baseline `{name}` {misfit}. Try one that fits: {others}.")


def run_baselines(
    names: Sequence[str],
    asking: Asking,
    *,
    train: Sequence[Example],
    dev: Sequence[Example],
    test: Sequence[Example],
    model_provider: Callable[[], torch.nn.Module],
    section: EvaluateSection,
    seed: int,
) -> dict[str, BaselineResult]:
    """Each named baseline on `test`: learned from `train` alone, settings chosen on `dev`, deterministic in `seed`.

    `model_provider` is called at most once, when the first baseline needs the untrained model; loading is not
    counted in its seconds. Empty without test rows. Raises UnsupportedError as `check_baselines` does.
    """
    return _run(names, _Inputs(asking.task, asking, train, dev, test, functools.cache(model_provider), section, seed))


def run_plain_baselines(
    names: Sequence[str],
    task: Task,
    *,
    train: Sequence[Example],
    dev: Sequence[Example],
    test: Sequence[Example],
    section: EvaluateSection,
    seed: int,
) -> dict[str, BaselineResult]:
    """The same for baselines that need no model; UnsupportedError for one that does."""

    def none() -> torch.nn.Module:
        raise UnsupportedError(f"No model is here. Received the baselines {', '.join(names)}. Try majority or tfidf.")

    return _run(names, _Inputs(task, None, train, dev, test, none, section, seed))


def _run(names: Sequence[str], inputs: _Inputs) -> dict[str, BaselineResult]:
    check_baselines(names, inputs.task)
    results: dict[str, BaselineResult] = {}
    for name in names if inputs.test else ():
        inputs.check()
        info, say = _REGISTRY[name]
        if info.needs_model:
            inputs.model()
        started = time.perf_counter()
        predictions, notes = say(inputs)
        seconds = time.perf_counter() - started
        metrics = measure(inputs.task, predictions, inputs.section, inputs.seed)
        results[name] = BaselineResult(predictions, metrics, seconds, tuple(notes))
    return results


def _majority(inputs: _Inputs) -> Says:
    golds = [e.gold for e in inputs.train if e.gold is not None]
    if not golds:
        raise DataError("Baseline `majority` needs a labelled training row. Received none. Try another baseline.")
    width = max(len(_names(inputs.task, e)) for e in [*inputs.train, *inputs.test])
    counts = np.bincount(golds, minlength=width).astype(np.float64)
    predictions = []
    for example in inputs.test:
        own = counts[: len(_names(inputs.task, example))]
        shares = own / own.sum() if own.sum() else np.full(len(own), 1 / len(own))
        predictions.append(candidate_prediction(inputs.task, example, shares))
    best = int(counts.argmax())
    said = inputs.task.labels[best] if inputs.task.labels else f"candidate {best + 1}"
    return predictions, [f"Always {said}: {counts[best] / counts.sum():.1%} of train."]


def _tfidf(inputs: _Inputs) -> Says:
    train, dev = _labelled(inputs.train), _labelled(inputs.dev)
    counts = linear.word_counts(*([item_text(e) for e in part] for part in (train, dev, inputs.test)))
    if counts is None:
        predictions, notes = _majority(inputs)
        return predictions, ["No words in the training texts, so it says what majority says.", *notes]
    return _linear(inputs, train, dev, counts, linear.TFIDF_C)


def _probe(inputs: _Inputs) -> Says:
    train, dev, renderer = _labelled(inputs.train), _labelled(inputs.dev), inputs.asking.renderer
    encoded = [text_ids(renderer, item_text(e)) for e in (*train, *dev, *inputs.test)]
    features = frozen_features(inputs.model(), [ids for ids, _ in encoded], pad=renderer.pad, **inputs.asking.passes)
    a, b = len(train), len(train) + len(dev)
    scaled = linear.standardised(features[:a], features[a:b], features[b:])
    predictions, notes = _linear(inputs, train, dev, scaled, linear.PROBE_C)
    cut = sum(1 for _, missing in encoded if missing)
    if cut:
        notes.append(f"{cut} of {len(encoded)} texts are longer than {renderer.max_length} tokens; their end was cut.")
    return predictions, notes


def _linear(
    inputs: _Inputs,
    train: Sequence[Example],
    dev: Sequence[Example],
    features: Sequence[object],
    grid: Sequence[float],
) -> Says:
    task = inputs.task

    def score(probabilities: np.ndarray) -> float:
        said = [candidate_prediction(task, e, p) for e, p in zip(dev, probabilities, strict=True)]
        choosing = task.statistics(said)[0]
        value = choosing(np.arange(len(said)))
        return value if choosing.higher_is_better else -value

    probabilities, note = linear.classify(
        features[0],
        np.array([e.gold for e in train], dtype=np.int64),
        features[1] if dev else None,
        features[2],
        n_classes=len(task.labels),
        grid=grid,
        score=score,
        seed=inputs.seed,
        check=inputs.check,
    )
    predictions = [candidate_prediction(task, e, p) for e, p in zip(inputs.test, probabilities, strict=True)]
    return predictions, [note]


def _zero_shot(inputs: _Inputs) -> Says:
    return predict_examples(inputs.model(), inputs.asking, inputs.test), []


def _in_context(inputs: _Inputs) -> Says:
    task, renderer, wanted = inputs.task, inputs.asking.renderer, inputs.section.demonstrations
    chosen = choose_demonstrations(task, inputs.train, inputs.test, wanted, inputs.seed)
    if task.form == "text":
        renderer = answer_renderer(inputs.model(), renderer)
    asked: list[Example] = []
    rendered: list[Rendered] = []
    left_out = rows_short = 0
    for example in inputs.test:
        inputs.check()
        question, pieces, kept = _fitted(renderer, example, chosen)
        asked.append(question)
        rendered += pieces
        left_out += len(chosen) - kept
        rows_short += kept < len(chosen)
    notes = [f"{len(chosen)} demonstrations from train: {', '.join(e.source for e in chosen)}."]
    if len(chosen) < wanted:
        notes.append(f"{wanted} were asked for; train has no more that are answered and not asked.")
    if left_out:
        notes.append(
            f"{left_out} did not fit, in {rows_short} of {len(asked)} rows, and were left out, the first ones first."
        )
    stop = () if any(SEPARATOR in (e.answer or "") for e in chosen) else (SEPARATOR,)
    predictions = predict_examples(inputs.model(), inputs.asking, asked, rendered=rendered, more_stops=stop)
    return predictions, notes


def _fitted(
    renderer: Renderer, example: Example, demonstrations: Sequence[Example]
) -> tuple[Example, list[Rendered], int]:
    """The question after as many demonstrations as fit, from the right; it rendered; and how many there are."""
    for first in range(len(demonstrations)):
        question = with_demonstrations(example, demonstrations[first:], masked=renderer.model_kind == "masked")
        if renderer.task.form == "text" and renderer.prompt(question).cut:
            continue
        pieces = renderer.render(question)
        if not any(r.cut for r in pieces):
            return question, pieces, len(demonstrations) - first
    return example, renderer.render(example), 0


def _lead3(inputs: _Inputs) -> Says:
    predictions = [
        Prediction(e.source, lead_n(item_text(e), 3), right_answer(e), references=e.references, group=e.group)
        for e in inputs.test
    ]
    return predictions, []


def _labelled(examples: Sequence[Example]) -> list[Example]:
    return [e for e in examples if e.gold is not None]


def _names(task: Task, example: Example) -> Sequence[str]:
    return task.labels or example.candidates


def _misfit(info: BaselineInfo, task: Task) -> str | None:
    if task.form not in info.forms:
        return f"fits tasks of the form {', '.join(info.forms)}, and {task.info.name} has the form {task.form}"
    if info.metric and not any(m.startswith(info.metric) for m in task.metrics):
        return f"is for tasks measured by {info.metric}, and {task.info.name} is measured by {', '.join(task.metrics)}"
    return None


_LABELLED, _ASKED = ("verbalizer", "head"), ("verbalizer", "choice", "text")
_ANSWERED = (*_LABELLED, "choice")
_REGISTRY: dict[str, tuple[BaselineInfo, Callable[[_Inputs], Says]]] = {
    info.name: (info, say)
    for info, say in (
        (BaselineInfo("majority", "Always the most frequent answer of train.", _ANSWERED, False), _majority),
        (BaselineInfo("lead3", "The first three sentences.", ("text",), False, metric="rouge"), _lead3),
        (BaselineInfo("tfidf", "Logistic regression on TF-IDF of words and word pairs.", _LABELLED, False), _tfidf),
        (BaselineInfo("zero_shot", "The untrained model, asked the same.", (*_ASKED, "chat"), True), _zero_shot),
        (BaselineInfo("in_context", "The untrained model, shown answered rows first.", _ASKED, True), _in_context),
        (BaselineInfo("probe", "Logistic regression on the untrained model's features.", _LABELLED, True), _probe),
    )
}
