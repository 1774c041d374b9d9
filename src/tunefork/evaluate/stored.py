"""Predictions on disk: one JSON object a line, as `tunefork.tasks.Prediction` has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tunefork.errors import RunError
from tunefork.run import RunFolder
from tunefork.tasks.base import Example, Prediction

_TUPLES = ("probabilities", "golds", "references")


def write_predictions(
    run: RunFolder, name: str, predictions: Sequence[Prediction], texts: Sequence[str] | None = None
) -> None:
    """Writes predictions/NAME.jsonl of a run; with `texts`, what was asked stands beside each answer."""
    lines = []
    for i, prediction in enumerate(predictions):
        values = asdict(prediction) | ({} if texts is None else {"text": texts[i]})
        lines.append(json.dumps(values) + "\n")
    run.write_predictions(f"{name}.jsonl", "".join(lines))


def shown_text(example: Example) -> str:
    """What a person is shown as the question of a row."""
    if example.messages:
        asked = [m.content for m in example.messages if m.role == "user"]
        return asked[-1] if asked else example.text
    return example.text or example.prompt


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote. Raises RunError naming the line that cannot be read."""
    known = {f.name for f in fields(Prediction)}
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            given: dict[str, Any] = json.loads(line)
            values: dict[str, Any] = {k: tuple(v) if k in _TUPLES else v for k, v in given.items() if k in known}
            found.append(Prediction(**values))
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(f"{path}:{number} must be a prediction. Received: {error}. Try measuring again.") from None
    return found
