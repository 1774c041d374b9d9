"""`migrate retrain`: the files a hosted model was made of, on a base of one's own, by the best method that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunefork.errors import RecipeError, RunError
from tunefork.files import make_folder, write_atomic, write_json
from tunefork.hosted.client import Client
from tunefork.hosted.formats import as_bytes
from tunefork.hosted.jobs import read_file
from tunefork.hosted.services import find_model
from tunefork.migrate.record import Recording, read_recording
from tunefork.recipe import Recipe, load_recipe
from tunefork.run import RunFolder
from tunefork.train.memory import available_bytes
from tunefork.words import size
from tunefork.workflows import Listener, finetune, plan_run


def retrain(
    recording: str | Path,
    model: str,
    out: str | Path,
    *,
    train: str | Path | None = None,
    methods: Sequence[str],
    sets: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Trains `model` by each method whose forecast fits this machine, and says which was best on dev.

    The training file is that of the recorded model's job, or `train`; what a job of the method `dpo` learned is trained
    as the task preference, all else as chat. Dev rows are carved from it; the recorded prompts with their right answers
    are the test rows of a chat, which choose nothing. Each method is a run in `out`; a run that is there is continued.
    `sets` are keys of the recipe. Writes and returns retrain.json: chosen, tried.

    Raises RecipeError without a training file, RunError where no method fits.
    """
    found, out = read_recording(recording), Path(out)
    make_folder(out)
    task = "preference" if ((found.about["job"] or {}).get("method") or {}).get("type") == "dpo" else "chat"
    test = _test_file(found) if task == "chat" else None
    data: dict[str, Any] = {"data.train": str(_training_file(found, train))}
    data |= {"data.test": test} if test else {"data.test_fraction": 0}
    room, tried = available_bytes(), list[dict[str, Any]]()
    for name in methods:
        method, _, adapter = name.partition("/")
        tree = {"model.name": model, "task.name": task, "train.method": method, "adapter.name": adapter, **data}
        tree |= {"evaluate.baselines": [], "out": str(out / name.replace("/", "-"))}
        tried.append({"name": name, **_tried(load_recipe(None, tree | dict(sets or {})), room, listener)})
        write_json(out / "retrain.json", {"chosen": None, "tried": tried})
    runs = [cell for cell in tried if cell["dev_loss"] is not None]
    if not runs:
        why = "; ".join(f"{cell['name']}: {cell['skipped']}" for cell in tried)
        raise RunError(f"A method must fit this machine. Received {why}. Try a smaller model.")
    best = min(runs, key=lambda cell: cell["dev_loss"])
    result = {"model": found.about["model"], "base": model, "chosen": best["path"], "tried": tried}
    write_json(out / "retrain.json", result)
    return result


def _tried(recipe: Recipe, room: int | None, listener: Listener | None) -> dict[str, Any]:
    """One method: its run and best loss on dev, or why it was left out."""
    path = Path(str(recipe.out))
    begun = (path / "recipe.yaml").exists()
    forecast = None if begun else plan_run(recipe).forecast.memory_bytes
    if forecast is not None and room is not None and forecast > room:
        return {"dev_loss": None, "skipped": f"forecast {size(forecast)}, and {size(room)} are free", "path": None}
    done = finetune(recipe, resume=begun and bool(RunFolder(path, None).checkpoint_steps()), listener=listener)
    looks = [look["value"] for look in done.result["train"]["looks"] if look["better"]]
    return {
        "dev_loss": looks[-1] if looks else None,
        "skipped": None if looks else "no look at dev",
        "path": str(done.path),
        "seconds": done.result["seconds"]["train"],
        "peak_memory_bytes": done.result["peak_memory_bytes"]["value"],
    }


def _training_file(found: Recording, train: str | Path | None) -> Path:
    if train is not None:
        return Path(train)
    file, job = found.path / "train.jsonl", found.about["job"] or {}
    if not file.exists():
        if not job.get("training_file"):
            raise RecipeError(
                f"Retraining needs the rows that {found.about['model']} was tuned on. Received a recording that does "
                "not know its job. Try --train FILE."
            )
        client = Client(find_model(found.about["model"]).service)
        write_atomic(file, read_file(client, job["training_file"]))
    return file


def _test_file(found: Recording) -> str | None:
    """The recorded prompts with right answers, as conversations; None where there are none."""
    lines = [
        {"messages": [*row.messages, {"role": "assistant", "content": row.reference}]}
        | ({"tools": list(row.tools)} if row.tools else {})
        for row in found.rows
        if row.reference
    ]
    if not lines:
        return None
    write_atomic(found.path / "labelled.jsonl", as_bytes(lines))
    return str(found.path / "labelled.jsonl")
