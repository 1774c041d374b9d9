"""`migrate compare`: what a recorded model said beside what another one says, on the same prompts."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tunefork.errors import DataError, MissingFileError, UnsupportedError
from tunefork.evaluate.harness import predict_examples
from tunefork.evaluate.summary import Value
from tunefork.evaluate.trained import is_trained, load_trained, load_untrained
from tunefork.files import write_json
from tunefork.hosted import find_model, is_hosted
from tunefork.hosted.asking import asking_hosted
from tunefork.hosted.prices import require_confirmed
from tunefork.metrics import MeanStatistic, bootstrap_interval, exact_match, paired_difference, rouge_l
from tunefork.migrate.record import Confirm, Recorded, Recording, read_recording
from tunefork.recipe import DataSection, Recipe, TaskSection, make_recipe
from tunefork.render import Renderer
from tunefork.tasks import Example, Message, Prediction, make_task
from tunefork.workflows import tuned_model

COMPARISON_SCHEMA = 1
SURE = 0.9  # probability of a whole answer
SHOWN = 12
OnAnswer = Callable[[int, int], None]
Measure = Callable[[str, Sequence[str]], float]
_MEASURES: dict[str, Measure] = {
    "exact_match": exact_match,
    "rougeL": lambda said, right: max(rouge_l(said, text).f1 for text in right),
}


def compare(
    recording: str | Path,
    model: str | Path,
    *,
    recipe: Recipe | None = None,
    confirm: Confirm = lambda estimate: False,
    on_answer: OnAnswer = lambda done, total: None,
) -> dict[str, Any]:
    """Asks `model` (a run or export of the task chat, a local chat model, or a hosted one) the recorded prompts.

    Of `recipe`, `hosted` is read for a hosted model, `model.device` for a run, and `model` for any other.

    Agreement is with the recorded answers, by normalised equality and ROUGE-L; where the right answers are known, both
    models are also measured against them, with the paired difference new - old. Intervals are 95 % bootstrap over
    rows. Writes and returns comparison.json in the recording's folder; `migrate report` makes a page of it.
    """
    found = read_recording(recording)
    rows = [row for row in found.rows if _can_be_asked(row)]
    if not rows:
        raise DataError(f"A comparison needs recorded answers in words, to prompts in words. {found.path} has none.")
    started = time.perf_counter()
    said = _ask(
        tuned_model(model) or str(model), found, rows, recipe or make_recipe({"task": "chat"}), confirm, on_answer
    )
    answered = {p.source for p in said}
    rows = [row for row in rows if row.source in answered]
    if not rows:
        raise DataError(f"A comparison needs answers of the new model. {model} refused every prompt. Try another one.")
    old, new = [row.answer or "" for row in rows], [p.predicted for p in said]
    known = [(str(row.reference), a, b) for row, a, b in zip(rows, old, new, strict=True) if row.reference]
    losses = [p.loss for p in said if p.loss is not None]
    similarity = [_MEASURES["rougeL"](b, [a]) for a, b in zip(old, new, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: (similarity[i], -(said[i].loss or 0.0)))
    result = {
        "schema": COMPARISON_SCHEMA,
        "old": found.about["model"],
        "new": str(model),
        "shutdown": found.about["shutdown"],
        "rows": len(rows),
        "left_out": len(found.rows) - len(rows),
        "agreement": {name: _value(name, f, new, [[a] for a in old]) for name, f in _MEASURES.items()},
        "sure": _by_sureness(rows, old, new),
        "scores": [_scores(name, f, known) for name, f in _MEASURES.items() if known],
        "loss_of_recorded_answers": sum(losses) / len(losses) if losses else None,
        "cut_short": sum(p.stopped is False for p in said),
        "changed": [_changed(rows[i], new[i], similarity[i]) for i in order if similarity[i] < 1][:SHOWN],
        "seconds": time.perf_counter() - started,
        "cost_of_recording": found.about["cost"],
    }
    write_json(found.path / "comparison.json", result)
    return read_comparison(found.path)


def read_comparison(path: str | Path) -> dict[str, Any]:
    """What `compare` left in a recording's folder."""
    file = Path(path) / "comparison.json"
    if not file.is_file():
        raise MissingFileError(f"{path} must hold comparison.json. It does not. Try `tunefork migrate compare` first.")
    return json.loads(file.read_bytes())


def _ask(
    model: str, found: Recording, rows: Sequence[Recorded], recipe: Recipe, confirm: Confirm, on_answer: OnAnswer
) -> list[Prediction]:
    """A prediction a row, in order, but for those that a service refuses."""
    examples = [_example(row) for row in rows]
    if is_hosted(model):
        given = found.about["request"]
        longest = given.get("max_completion_tokens") or given.get("max_tokens") or 1024
        task = make_task(TaskSection(name="chat", max_new_tokens=longest), DataSection(), "causal", ())
        with asking_hosted(find_model(model), task, recipe.hosted) as asking:
            require_confirmed(asking.estimate(examples), recipe.hosted.limit, confirm)
            said = asking.predict(examples, on_answer=on_answer)[0]
            return [p for p in said if p.source not in asking.unanswered]
    chat = make_task(TaskSection(name="chat"), DataSection(), "causal", ())
    if not is_trained(model):
        trained = load_untrained(recipe.model.model_copy(update={"name": model}), chat, False)
    else:
        trained = load_trained(model, recipe.model.device, trust_remote_code=recipe.model.trust_remote_code)
    task = chat if trained.task.objective == "preference" else copy.copy(trained.task)
    if task.form != "chat":
        raise UnsupportedError(
            f"Recorded conversations are asked of a chat model. Received {model!r}, trained for "
            f"{trained.task.info.name}. Try `tunefork migrate retrain`."
        )
    longest = max(len(trained.tokenizer.encode(row.answer)) for row in rows)
    task.max_new_tokens = max(task.max_new_tokens, longest + 16)  # so that it could say all that was recorded
    renderer = Renderer(trained.tokenizer, trained.facts.kind, task, trained.renderer.max_length, True)
    return predict_examples(trained.model, replace(trained.asking(4096), renderer=renderer), examples, generated=True)


def _example(row: Recorded) -> Example:
    """The recorded answer as the reply: its loss is how likely the new model finds it."""
    given = [Message(m["role"], _plain(m.get("content")), False, _extra(m)) for m in row.messages]
    reply = Message("assistant", row.answer or "")
    references = (row.reference,) if row.reference else (reply.content,)
    return Example(row.source, messages=(*given, reply), tools=tuple(row.tools), references=references)


def _can_be_asked(row: Recorded) -> bool:
    """Answered in words, to a prompt of words alone."""
    contents = [m["content"] for m in row.messages if isinstance(m.get("content"), list)]
    return bool(row.answer) and not row.tool_calls and all(p.get("type") == "text" for c in contents for p in c)


def _plain(content: Any) -> str:
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    return "\n".join(str(part.get("text") or "") for part in parts)


def _extra(message: Mapping[str, Any]) -> dict[str, Any] | None:
    return {k: v for k, v in message.items() if k not in ("role", "content")} or None


def _by_sureness(rows: Sequence[Recorded], old: Sequence[str], new: Sequence[str]) -> list[dict[str, Any]]:
    """Agreement where the old model gave its whole answer a probability of at least SURE, and where less."""
    parts: dict[str, list[int]] = {"sure": [], "unsure": []}
    for i, row in enumerate(rows):
        if row.tokens:
            total = math.exp(sum(token["logprob"] for token in row.tokens))
            parts["sure" if total >= SURE else "unsure"].append(i)
    return [
        {"name": name, **_value("exact_match", exact_match, [new[i] for i in part], [[old[i]] for i in part])}
        for name, part in parts.items()
        if part
    ]


def _value(name: str, measure: Measure, said: Sequence[str], right: Sequence[Sequence[str]]) -> Value:
    statistic = MeanStatistic(name, [measure(s, r) for s, r in zip(said, right, strict=True)])
    found = bootstrap_interval(statistic, len(said))
    return Value(value=found.value, low=found.low, high=found.high, n=found.n)


def _scores(name: str, measure: Measure, known: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """Both models against the right answers, and new - old. `known` has (right, old, new) of each row."""
    right, old, new = ([[row[0]] for row in known], [row[1] for row in known], [row[2] for row in known])
    a, b = (MeanStatistic(name, [measure(s, r) for s, r in zip(said, right, strict=True)]) for said in (new, old))
    values = {"new": _value(name, measure, new, right), "old": _value(name, measure, old, right)}
    return {"metric": name, **values, "difference": asdict(paired_difference(a, b, len(right)))}


def _changed(row: Recorded, now: str, similarity: float) -> dict[str, Any]:
    text = _plain(row.messages[-1].get("content"))
    said = {"gold": row.reference, "before": row.answer, "after": now, "similarity": similarity}
    return {"source": Path(row.source).name, "text": text, **said}
