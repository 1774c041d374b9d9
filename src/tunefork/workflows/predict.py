"""A file in; the same file with prediction and probability columns out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunefork.data import Finding, Row, apply_layout, check_target, read_rows, write_rows
from tunefork.data.findings import LEFT_OUT
from tunefork.data.values import listed
from tunefork.errors import DataError, UnsupportedError
from tunefork.evaluate.harness import predict_examples
from tunefork.evaluate.trained import load_trained
from tunefork.hosted import is_hosted
from tunefork.hosted.asking import asking_hosted
from tunefork.hosted.prices import Estimate, require_confirmed
from tunefork.recipe import DataSection, EvaluateSection
from tunefork.tasks import Example, Prediction, Task, build_examples
from tunefork.tasks.check import check_rendered, cut_prompts
from tunefork.workflows.tuned import open_tuned

REASON = "prediction_missing_because"
_LENIENT = {"max_unusable": 1.0, "max_cut": 1.0}


@dataclass(frozen=True, slots=True)
class Predictions:
    """Where the rows went, how many have a prediction, why the others have none, and what was found in them.

    `columns` are those that were added: the prediction, a probability a label, and the reason.
    """

    path: Path
    rows: int
    predicted: int
    columns: Sequence[str]
    findings: Sequence[Finding]


def predict(
    run: str | Path,
    file: str | Path,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    confirm: Callable[[Estimate], bool] = lambda estimate: False,
) -> Predictions:
    """Predicts every row of `file` and writes it, with its own columns first, to `out`.

    The model of a hosted run is asked at its service: unless the run has a `hosted.limit`, `confirm` hears what that
    may cost and says whether to go on.

    `out` defaults to `NAME.predicted.EXT` beside the file; one that is there is refused unless `overwrite`. A row that
    cannot be used keeps its place, with the reason in `prediction_missing_because`; one that cannot be read has no
    other values. Labels are not needed, and not looked at. Where the file has a column of one of the new names already,
    all new ones end in `_2` (`_3` …). `trust_remote_code`: whether a base that brings its own Python code may run it.
    """
    rows, findings = read_rows(str(file), unreadable=True)
    file = Path(file)
    target = Path(out) if out is not None else file.with_name(_predicted_name(file.name))
    if target.exists() and file.exists() and target.samefile(file):
        raise DataError(
            f"Predictions must not replace the rows they are made for. Received {str(target)!r} for both. "
            "Try another --out."
        )
    check_target(target, overwrite)
    asked = _hosted(run, confirm) or _local(run, device, trust_remote_code)
    task, lenient = asked.task, asked.data
    readable = [row for row in rows if not row.unreadable]
    laid_out, more = apply_layout(readable, lenient.layout, lenient.fields, answers=False)
    examples, unusable = build_examples(task, laid_out, lenient, labelled=False)
    if not examples:
        first = next((line for found in (*unusable, *more) for line in found.examples), "")
        raise DataError(
            f"`{file}` must hold a row that can be asked. Received {len(rows)}, none of them usable: {first}"
        )
    predictions, cut, unanswered = asked.answer(examples)
    by_row: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_row.setdefault(_row_of(prediction.source), []).append(prediction)
    questions = Counter((part.file, part.line) for part in task.rows(laid_out))
    names, renamed = _new_columns(readable, task.labels)
    columns = dict.fromkeys(column for row in readable for column in row.values)
    filled: list[dict[str, Any]] = []
    for row in rows:
        found = by_row.get(row.source, [])
        whole = len(found) == questions[row.file, row.line] > 0
        values = _filled(replace(row, values=row.values or columns), found, names)
        filled.append(
            values if whole else {**values, names[-1]: unanswered.get(row.source) or _why(row, task, lenient)}
        )
    write_rows(target, filled, overwrite=overwrite)
    return Predictions(target, len(rows), len(by_row), names, [*findings, *renamed, *more, *unusable, *cut])


@dataclass(frozen=True)
class _Asked:
    """A model to predict with. `answer` gives predictions, what was found, and why rows by their source have none."""

    task: Task
    data: DataSection  # as in training, except that every row keeps its place
    answer: Callable[[Sequence[Example]], tuple[list[Prediction], list[Finding], Mapping[str, str]]]


def _local(run: str | Path, device: str, trusted: bool) -> _Asked:
    trained = load_trained(run, device, trust_remote_code=trusted)
    task, renderer, lenient = trained.task, trained.renderer, trained.data.model_copy(update=_LENIENT)

    def answer(examples: Sequence[Example]) -> tuple[list[Prediction], list[Finding], Mapping[str, str]]:
        asking, generated = trained.asking(EvaluateSection().tokens_per_batch), task.form in ("text", "chat")
        rendered = [r for example in examples for r in renderer.render(example)]
        predictions = predict_examples(trained.model, asking, examples, rendered=rendered, generated=generated)
        cut = cut_prompts(predictions)  # of rows that are not generated from, what was read is in `rendered`
        if not generated:
            found = check_rendered({"test": rendered}, task, renderer, lenient)
            cut = [replace(finding, split="") for finding in found if finding.code == "cut-row"]
        return predictions, cut, {}

    return _Asked(task, lenient, answer)


def _hosted(run: str | Path, confirm: Callable[[Estimate], bool]) -> _Asked | None:
    if is_hosted(str(run)):
        raise UnsupportedError(
            f"A prediction needs a run, which knows its task. Received {str(run)!r}. Try a hosted run's folder, or "
            "`tunefork evaluate --model NAME --task TASK --test FILE`."
        )
    if (tuned := open_tuned(run)) is None:
        return None

    def answer(examples: Sequence[Example]) -> tuple[list[Prediction], list[Finding], Mapping[str, str]]:
        with asking_hosted(tuned.model, tuned.task, tuned.section) as asking:
            require_confirmed(asking.estimate(examples), tuned.section.limit, confirm)
            predictions, notes = asking.predict(examples)
            told = [Finding("info", "hosted", note) for note in (*notes, asking.cost())]
        why = {_row_of(source): text for source, text in asking.unanswered.items()}
        return [p for p in predictions if p.source not in asking.unanswered], told, why

    return _Asked(tuned.task, tuned.data.model_copy(update=_LENIENT), answer)


def _row_of(source: str) -> str:
    """The row of a question: one row may hold several, file:line#1, file:line#2 …"""
    name, _, line = source.rpartition(":")
    return f"{name}:{line.partition('#')[0]}"


def _why(row: Row, task: Task, section: DataSection) -> str:
    """What keeps a row, or a question of it, from being used: looked at alone, as findings name the first few only."""
    if row.unreadable:
        return f"line {row.line} cannot be read: {row.unreadable}"
    try:
        laid_out, found = apply_layout([row], section.layout, section.fields, answers=False)
    except DataError as error:
        return str(error)
    found = [f for f in found if f.code in LEFT_OUT]
    for part in task.rows(laid_out):
        found += build_examples(task, [part], section, labelled=False)[1]
    lines = [line.removeprefix(row.source).removeprefix(": ") for f in found for line in f.examples]
    return "; ".join(lines) or "it holds no question"


def _new_columns(rows: Sequence[Row], labels: Sequence[str]) -> tuple[list[str], list[Finding]]:
    """Names that no row has, and, where they are not the usual ones, a word about it."""
    usual = ["prediction", *(f"probability_{label}" for label in labels), REASON]
    there = {column for row in rows for column in row.values}
    taken = [name for name in usual if name in there]
    if not taken:
        return usual, []
    numbered = ([f"{name}_{n}" for name in usual] for n in itertools.count(2))
    names = next(found for found in numbered if there.isdisjoint(found))
    message = f"The file has {listed(taken)} already, kept as it is; the new columns are {listed(names[:-1])}."
    return names, [Finding("warning", "columns-renamed", message, len(taken))]


def _filled(row: Row, predictions: Sequence[Prediction], names: Sequence[str]) -> dict[str, Any]:
    """The row with its new columns but the last; lists where the row holds several questions."""
    prediction, *probabilities, _ = names
    values = {**row.values, prediction: _one([p.predicted for p in predictions])}
    for i, name in enumerate(probabilities):
        values[name] = _one([round(p.probabilities[i], 6) for p in predictions])
    return values


def _one(found: list[Any]) -> Any:
    return found[0] if len(found) == 1 else found or None


def _predicted_name(name: str) -> str:
    stem, dot, extension = name.partition(".")
    return f"{stem}.predicted{dot}{extension}"
