"""What a hosted run is about to send, checked by the service's rules, with what it may cost. Nothing is sent here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunefork.data import Finding, check_items, check_target, read_files
from tunefork.errors import RecipeError
from tunefork.evaluate.baselines import check_baselines, fitting_baselines
from tunefork.evaluate.demonstrations import SEPARATOR, choose_demonstrations, with_demonstrations
from tunefork.files import make_folder, write_atomic
from tunefork.hosted import find_model, is_hosted
from tunefork.hosted.asking import HostedAsking
from tunefork.hosted.formats import as_bytes, check_lines, find_format, in_format, training_lines
from tunefork.hosted.prices import Estimate, estimate_requests, estimate_tokens, estimate_training, find_price
from tunefork.hosted.services import HostedModel
from tunefork.recipe import Recipe
from tunefork.recipe.resolve import refuse_demonstrations
from tunefork.tasks import Example, Task, build_examples, make_task, split_rows
from tunefork.tasks.build import as_item
from tunefork.train.prepare import refuse_errors

SPLITS = ("train", "dev", "test")
ASKED = ("zero_shot", "in_context")  # baselines that the untrained hosted model is asked for


@dataclass(frozen=True)
class HostedPlan:
    """What is sent, what it may cost, and what was found in the rows; made without a request."""

    recipe: Recipe
    model: HostedModel
    task: Task
    examples: Mapping[str, Sequence[Example]]
    lines: Mapping[str, Sequence[Mapping[str, Any]]]  # of train and dev
    findings: Sequence[Finding]
    origin: Mapping[str, str]
    baselines: tuple[str, ...]
    estimate: Estimate

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows and estimated tokens of each split."""
        found: dict[str, dict[str, int]] = {}
        for name in SPLITS:
            lines = self.lines.get(name) or training_lines(self.task, self.examples[name], self.recipe.hosted.system)
            tokens = [_tokens(line) for line in lines]
            sums = {"tokens": sum(tokens), "trained_tokens": 0, "longest": max(tokens, default=0)}
            found[name] = {"rows": len(tokens), **sums}
        return found


def plan_hosted(recipe: Recipe) -> HostedPlan:
    """Reads, checks by the service's published rules, and estimates. Findings may hold errors."""
    model = _check(recipe)
    recipe, task, examples, findings, origin = _read(recipe)
    if task.objective == "preference" and examples["test"]:
        said = "Preferences are not measured: a service tells no likelihoods."
        findings.append(Finding("info", "not-measured", said))
        examples["test"] = []
    rules = find_format(model.service.rules)
    lines = {name: training_lines(task, examples[name], recipe.hosted.system) for name in ("train", "dev")}
    for name, part in lines.items():
        findings += check_lines(rules, part, [e.source for e in examples[name]], name)
    fitting = tuple(name for name in fitting_baselines(task) if name != "probe")
    asked = recipe.evaluate.baselines
    if asked != "auto":
        check_baselines(asked, task)
        if "probe" in asked:
            raise RecipeError("Baseline `probe` needs a model's features, which a service keeps. Try tfidf.")
    baselines = (fitting if asked == "auto" else tuple(asked)) if examples["test"] else ()
    refuse_demonstrations(recipe.evaluate, baselines)
    return HostedPlan(
        recipe,
        model,
        task,
        examples,
        lines,
        findings,
        origin,
        baselines,
        _estimate(recipe, model, task, examples, lines, baselines),
    )


def export_lines(recipe: Recipe, to: str, out: Path, overwrite: bool = False) -> tuple[dict[str, Path], list[Finding]]:
    """Writes train.jsonl and valid.jsonl of a recipe as the service `to` wants them into `out`; nothing where refused.

    Raises RecipeError for a service without a format, DataError where its published rules refuse the rows, or a file is
    there already, unless `overwrite`.
    """
    rules = find_format(to)
    recipe, task, examples, findings, _ = _read(recipe)
    lines = {
        name: in_format(rules, training_lines(task, examples[name], recipe.hosted.system)) for name in ("train", "dev")
    }
    for name, part in lines.items():
        train_bytes = len(as_bytes(lines["train"]))
        findings += check_lines(rules, part, [e.source for e in examples[name]], name, train_bytes)
    refuse_errors(findings)
    make_folder(out)
    paths = {"train": out / "train.jsonl", "dev": out / "valid.jsonl"}
    for path in paths.values():
        check_target(path, overwrite)
    for name, part in lines.items():
        write_atomic(paths[name], as_bytes(part))
    return paths, findings


def _read(recipe: Recipe) -> tuple[Recipe, Task, dict[str, list[Example]], list[Finding], Mapping[str, str]]:
    """The recipe with its layout, the task, examples by split, everything found in the rows, and their origin."""
    files = read_files(recipe.data)
    section = recipe.data.model_copy(update={"layout": files.layout})
    task = make_task(recipe.task, section, "causal", [row for rows in files.rows.values() for row in rows])
    splits, findings = split_rows(task, files, section)
    examples: dict[str, list[Example]] = {}
    for name in SPLITS:
        examples[name], more = build_examples(task, getattr(splits, name), recipe.data, labelled=True)
        findings += [replace(f, split=name) for f in more]
    items = [[as_item(e, task) for e in examples[name]] for name in SPLITS]
    findings += check_items(*items, section=recipe.data, labels_expected=bool(task.labels))
    return recipe.model_copy(update={"data": section}), task, examples, findings, splits.origin


def questions_of(
    task: Task, recipe: Recipe, examples: Mapping[str, Sequence[Example]], name: str
) -> tuple[Sequence[Example], tuple[str, ...]]:
    if name == "zero_shot":
        return examples["test"], ()
    count = recipe.evaluate.demonstrations
    chosen = choose_demonstrations(task, examples["train"], examples["test"], count, recipe.seed)
    asked = [with_demonstrations(example, chosen, masked=False) for example in examples["test"]]
    return asked, (SEPARATOR,) if task.form == "text" else ()


def _estimate(
    recipe: Recipe,
    model: HostedModel,
    task: Task,
    examples: Mapping[str, Sequence[Example]],
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    baselines: Sequence[str],
) -> Estimate:
    """Training, the test rows asked of the tuned model, and baselines asked of the untrained one."""
    rows = len(lines["train"])
    tokens = round(sum(map(_tokens, lines["train"])) * _epochs(recipe, rows))
    prices = recipe.hosted.prices
    total = estimate_training(tokens, find_price(model, prices))
    tuned = model.sibling(f"ft:{model.id}:tuned::one")
    asked: list[tuple[HostedModel, Sequence[Example], tuple[str, ...]]] = [(tuned, examples["test"], ())]
    asked += [(model, *questions_of(task, recipe, examples, name)) for name in baselines if name in ASKED]
    for which, questions, stops in asked:
        bodies = [HostedAsking.body(task, which, recipe.hosted, e, stops) for e in questions]
        total += estimate_requests(bodies, find_price(which, prices))
    return total


def _tokens(line: Mapping[str, Any]) -> int:
    if "messages" in line:
        return estimate_tokens(line["messages"])
    outputs = [*line["preferred_output"], *line["non_preferred_output"]]
    return estimate_tokens([*line["input"]["messages"], *outputs])


def _epochs(recipe: Recipe, rows: int) -> float:
    """OpenAI's rule for `auto`, as its cookbook on preparing chat data has it: about 3, for 100 to 25,000 rows seen."""
    if recipe.train.epochs != "auto":
        return float(recipe.train.epochs)
    if 3 * rows < 100:
        return min(25, 100 // max(rows, 1))
    return 3 if 3 * rows <= 25_000 else max(1, 25_000 // rows)


def _check(recipe: Recipe) -> HostedModel:
    """Raises RecipeError for what no service reads, or a model that is none of a service's."""
    if not is_hosted(recipe.model.name):
        raise RecipeError(
            f"The method hosted needs a service's model. Received {recipe.model.name!r}. Try openai:gpt-4.1-mini."
        )
    if recipe.train.learning_rate not in ("auto", None):
        raise RecipeError(
            "A service takes a multiple of its own learning rate. Received `train.learning_rate`. "
            "Try --set hosted.learning_rate_multiplier=2."
        )
    if recipe.train.epochs != "auto" and recipe.train.epochs != int(recipe.train.epochs):
        raise RecipeError(f"A service trains whole epochs. Received {recipe.train.epochs:g}. Try --epochs 3.")
    if recipe.train.max_steps is not None:
        raise RecipeError("A service counts epochs. Received `train.max_steps`. Try --epochs 1.")
    return find_model(recipe.model.name)
