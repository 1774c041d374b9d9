"""Measures a model on labelled rows: a run, or any model folder or hub name as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunefork.data import Finding, Row, load_splits, overlap, read_files
from tunefork.errors import DataError, MissingFileError, RecipeError
from tunefork.evaluate.baselines import check_baselines, run_baselines
from tunefork.evaluate.harness import predict_examples
from tunefork.evaluate.summary import measure
from tunefork.evaluate.trained import Trained, is_trained, load_trained, load_untrained
from tunefork.hosted import find_model, is_hosted
from tunefork.hosted.asking import HostedAsking, asking_hosted
from tunefork.hosted.prices import Estimate, require_confirmed
from tunefork.models import inspect_model
from tunefork.recipe import DataSection, EvaluateSection, Recipe, load_recipe
from tunefork.run import RunFolder
from tunefork.tasks import Example, Prediction, Task, build_examples, make_task
from tunefork.tasks.build import as_item, split_rows
from tunefork.tasks.check import check_rendered, cut_prompts
from tunefork.train.prepare import refuse_errors
from tunefork.workflows.finetune import as_recipe
from tunefork.workflows.hosted_plan import questions_of
from tunefork.workflows.tuned import tuned_model


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics with intervals, the predictions behind them, and what was found in the rows."""

    metrics: Mapping[str, Mapping[str, Any]]
    predictions: Sequence[Prediction]
    findings: Sequence[Finding]
    seconds: float
    notes: Sequence[str] = field(default=())


def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | None = None,
    shots: int = 0,
    trust_remote_code: bool = False,
    confirm: Callable[[Estimate], bool] = lambda estimate: False,
    on_answer: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Metrics of `model` on the rows of `data` (default: the recipe's test file, or a run's own test rows).

    A service's model (`openai:gpt-4.1-mini`) is asked in its name; unless `hosted.limit` is set, `confirm` hears what
    that may cost and says whether to go on, and `on_answer` (answered, of how many).

    `model` is a run or exported folder, which knows its task; for any other model folder or hub name `recipe`
    says which task, and the model is asked without training, after up to `shots` answered rows of the recipe's train
    file. Rows that a run was trained on are among its findings. Code that a run's base brings runs where
    `trust_remote_code` says so, that of another model also where the recipe does.

    Raises DataError when no row is usable, or more of them are bad or cut than the recipe's `data` allows; RunError
    for a run that kept no model.
    """
    wanted = as_recipe(recipe) if recipe is not None else None
    labels = None
    if (tuned := tuned_model(model)) is not None:
        labels = RunFolder.open(model, write=False).read_result()["labels"] or None
        wanted = wanted or load_recipe(Path(model))
        only_test = wanted.data.model_copy(update={"train": None, "dev": None})
        model, wanted = tuned, wanted.model_copy(update={"data": only_test})
    rows_at = str(data) if data is not None else wanted.data.test if wanted is not None else None
    run = load_recipe(Path(model)) if (Path(model) / "recipe.yaml").is_file() else None
    _check_shots(shots, wanted, trained=tuned is not None or run is not None or is_trained(model))
    if rows_at is None and run is None:
        raise RecipeError("`evaluate` needs labelled rows. Received none. Try --test rows.csv.")
    if is_trained(model) or run is not None:  # a run without a model is refused in loading
        trained = load_trained(model, wanted.model.device if wanted else "auto", trust_remote_code=trust_remote_code)
        section = wanted.evaluate if wanted else EvaluateSection()
        limits = (wanted.data if wanted else DataSection()).model_dump(include={"max_unusable", "max_cut"})
        own = trained.data.model_copy(update={**limits, "test": rows_at})
        if rows_at is None and run is not None:
            splits, findings = split_rows(trained.task, read_files(run.data), run.data)
            findings = [finding for finding in findings if finding.split == "test"]
        else:
            splits, findings = load_splits(own, 0, None)
            findings += _seen_before(splits.test, trained.task, run) if run is not None else []
        return _measured(trained, splits.test, findings, own, section, wanted.seed if wanted else 0)
    assert rows_at is not None
    if wanted is None:
        raise RecipeError(f"{str(model)!r} is not a run, so the task must be given. Try --task classification.")
    name = wanted.model.model_copy(update={"name": str(model)})
    if trust_remote_code:
        name = name.model_copy(update={"trust_remote_code": True})
    hosted = find_model(str(model)) if is_hosted(str(model)) else None
    facts = None if hosted is not None else inspect_model(name)
    splits, findings = load_splits(
        wanted.data.model_copy(update={"test": rows_at, "dev_fraction": 0}), wanted.data.split_seed, None
    )
    kind = facts.kind if facts is not None else "causal"
    laid_out = wanted.data.model_copy(update={"layout": splits.layout})
    task = make_task(wanted.task, laid_out, kind, splits.train or splits.test, labels)
    if shots:
        check_baselines(("in_context",), task)
        wanted = wanted.model_copy(update={"evaluate": wanted.evaluate.model_copy(update={"demonstrations": shots})})
    shown = build_examples(task, splits.train, wanted.data, labelled=True)[0] if shots else []
    if hosted is not None:
        examples, findings = _examples(task, splits.test, findings, wanted.data)
        refuse_errors(findings)
        with asking_hosted(hosted, task, wanted.hosted) as asking:
            return _asked(asking, {"train": shown, "test": examples}, findings, wanted, confirm, on_answer)
    trained = load_untrained(name, task, wanted.task.chat_template)
    return _measured(trained, splits.test, findings, wanted.data, wanted.evaluate, wanted.seed, shown)


def _check_shots(shots: int, recipe: Recipe | None, trained: bool) -> None:
    """Raises RecipeError for answered rows that are to be shown to a run, or that no file holds."""
    if shots and trained:
        raise RecipeError("A run is asked as it was trained. Received `shots`. Try it on a model as it is.")
    if shots and (recipe is None or recipe.data.train is None):
        raise RecipeError("`shots` are answered rows of a train file. Received none. Try --train rows.csv.")


def _seen_before(rows: Sequence[Row], task: Task, run: Recipe) -> list[Finding]:
    """What a run was trained on among `rows`, where its training rows are still there."""
    try:
        splits, _ = split_rows(task, read_files(run.data), run.data)
    except (MissingFileError, DataError):
        gone = f"{run.data.train} cannot be read any more, so training rows among these were not looked for."
        return [Finding("info", "unknown-overlap", gone, split="test")]
    train, test = (build_examples(task, some, run.data, labelled=True)[0] for some in (splits.train, rows))
    return overlap([as_item(e, task) for e in train], [as_item(e, task) for e in test])


def _measured(
    trained: Trained,
    rows: Sequence[Row],
    findings: list[Finding],
    data: DataSection,
    section: EvaluateSection,
    seed: int,
    shown: Sequence[Example] = (),
) -> Evaluation:
    task, renderer = trained.task, trained.renderer
    examples, findings = _examples(task, rows, findings, data)
    rendered = [r for example in examples for r in renderer.render(example)]
    findings += check_rendered({"test": rendered}, task, renderer, data)
    refuse_errors(findings)
    started = time.perf_counter()
    asking, generated = trained.asking(section.tokens_per_batch), task.form == "chat" or None
    if shown:
        splits: dict[str, Sequence[Example]] = {"train": shown, "dev": (), "test": examples}
        found = run_baselines(
            ("in_context",), asking, **splits, model_provider=lambda: trained.model, section=section, seed=seed
        )["in_context"]
        return Evaluation(found.metrics, found.predictions, findings, time.perf_counter() - started, found.notes)
    predictions = predict_examples(trained.model, asking, examples, rendered=rendered, generated=generated)
    metrics = measure(task, predictions, section, seed)
    return Evaluation(metrics, predictions, [*findings, *cut_prompts(predictions)], time.perf_counter() - started)


def _asked(
    asking: HostedAsking,
    examples: Mapping[str, Sequence[Example]],
    findings: list[Finding],
    recipe: Recipe,
    confirm: Callable[[Estimate], bool],
    on_answer: Callable[[int, int], None],
) -> Evaluation:
    started = time.perf_counter()
    asked, stops = questions_of(asking.task, recipe, examples, "in_context" if examples["train"] else "zero_shot")
    require_confirmed(asking.estimate(asked, stops), recipe.hosted.limit, confirm)
    predictions, notes = asking.predict(asked, stops=stops, on_answer=on_answer)
    metrics = measure(asking.task, predictions, recipe.evaluate, recipe.seed)
    return Evaluation(metrics, predictions, findings, time.perf_counter() - started, [*notes, asking.cost()])


def _examples(
    task: Task, rows: Sequence[Row], findings: Sequence[Finding], data: DataSection
) -> tuple[list[Example], list[Finding]]:
    """An example a usable row, and all findings so far. Raises DataError where there is no such row."""
    examples, more = build_examples(task, rows, data, labelled=True)
    findings = [*findings, *(replace(finding, split="test") for finding in more)]
    if not examples:
        wrong = [finding for finding in findings if finding.level != "info"]
        shown = " ".join(f"{f.message} The first: {f.examples[0]}." for f in wrong[:3] if f.examples)
        raise DataError(f"Evaluation needs at least one usable labelled row. Received none. {shown}")
    return examples, findings
