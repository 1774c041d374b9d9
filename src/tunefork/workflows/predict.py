"""A file in; the same file with prediction and probability columns out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.data import Finding, Row, apply_layout, read_rows, write_rows
from tunefork.errors import DataError
from tunefork.evaluate.harness import predict_examples
from tunefork.evaluate.trained import load_trained
from tunefork.recipe import EvaluateSection
from tunefork.tasks import Prediction, build_examples

PREDICTION, REASON = "prediction", "prediction_missing_because"


@dataclass(frozen=True, slots=True)
class Predictions:
    """Where the rows went, how many have a prediction, and why the others have none."""

    path: Path
    rows: int
    predicted: int
    findings: Sequence[Finding]


def predict(run: str | Path, file: str | Path, out: str | Path | None = None, *, device: str = "auto") -> Predictions:
    """Predicts every row of `file` and writes it, with its own columns first, to `out`.

    `out` defaults to `NAME.predicted.EXT` beside the file. A row that cannot be used keeps its place, with the
    reason in `prediction_missing_because`. Labels are not needed.
    """
    file = Path(file)
    target = Path(out) if out is not None else file.with_name(_predicted_name(file.name))
    if target.exists() and file.exists() and target.samefile(file):
        raise DataError(
            f"Predictions must not replace the rows they are made for. Received {str(target)!r} for both. "
            "Try another --out."
        )
    trained = load_trained(run, device)
    rows, findings = read_rows(str(file))
    laid_out, more = apply_layout(rows, trained.data.layout, trained.data.fields, answers=False)
    lenient = trained.data.model_copy(update={"max_unusable": 1.0})  # a row that cannot be used keeps its place
    examples, unusable = build_examples(trained.task, laid_out, lenient, labelled=False)
    if not examples:
        first = next((line for found in (*unusable, *more) for line in found.examples), "")
        raise DataError(
            f"`{file}` must hold a row that can be asked. Received {len(rows)}, none of them usable: {first}"
        )
    asking = trained.asking(EvaluateSection().tokens_per_batch)
    predictions = predict_examples(trained.model, asking, examples, generated=trained.task.form in ("text", "chat"))
    by_row: dict[str, list[Prediction]] = {}
    for prediction in predictions:  # one row may hold several questions: file:line#1, file:line#2 …
        by_row.setdefault(prediction.source.partition("#")[0], []).append(prediction)
    why = {line.partition(": ")[0]: line.partition(": ")[2] for f in unusable for line in f.examples}
    labels = trained.task.labels
    filled = [_filled(row, by_row.get(row.source, []), labels, why.get(row.source, "row not usable")) for row in rows]
    write_rows(target, filled)
    return Predictions(target, len(rows), len(predictions), [*findings, *more, *unusable])


def _filled(row: Row, predictions: Sequence[Prediction], labels: Sequence[str], why: str) -> dict[str, Any]:
    """The row with its new columns; lists where the row holds several questions."""
    values = dict(row.values)
    values[PREDICTION] = _one([p.predicted for p in predictions])
    for i, label in enumerate(labels):
        values[f"probability_{label}"] = _one([round(p.probabilities[i], 6) for p in predictions])
    if not predictions:
        values[REASON] = why
    return values


def _one(found: list[Any]) -> Any:
    return found[0] if len(found) == 1 else found or None


def _predicted_name(name: str) -> str:
    stem, dot, extension = name.partition(".")
    return f"{stem}.predicted{dot}{extension}"
