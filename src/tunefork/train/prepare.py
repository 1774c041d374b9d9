"""From a recipe to everything a run needs, before anything is trained or written: rows, examples, tensors, reasons."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunefork.data import Finding, Row, Splits, check_items, read_files
from tunefork.data.findings import LEFT_OUT, refuse_shares
from tunefork.data.values import counted
from tunefork.errors import DataError, RecipeError
from tunefork.evaluate.baselines import BaselineResult, check_baselines, fitting_baselines, run_baselines
from tunefork.evaluate.harness import Asking, nothing
from tunefork.evaluate.objective import check_objective, is_mean
from tunefork.methods import check_settings, learns_beside, method_info, usual_batch
from tunefork.models import (
    ModelFacts,
    adapter_targets,
    autocast,
    check_support,
    choose_device,
    choose_dtype,
    inspect_model,
    load_base,
    load_tokenizer,
    torch_dtype,
    usable_positions,
)
from tunefork.models.base import has_trained_head
from tunefork.recipe import DataSection, Reason, Recipe, Resolved, resolve
from tunefork.recipe.resolve import Situation
from tunefork.render import Rendered, Renderer
from tunefork.tasks import Example, Task, build_examples, make_task, split_rows
from tunefork.tasks.build import as_item
from tunefork.tasks.check import check_rendered

LONGEST_AUTOMATIC = 4096
SPLITS = ("train", "dev", "test")
FEW_DEV, FEW_TEST = 10, 30  # rows below which a split is warned of


@dataclass(frozen=True)
class Job:
    """A run, ready to start. `findings` may hold errors; `refuse_errors` turns them into a refusal."""

    resolved: Resolved
    facts: ModelFacts
    task: Task
    tokenizer: Any
    renderer: Renderer
    device: torch.device
    rows: Mapping[str, Sequence[Row]]
    examples: Mapping[str, Sequence[Example]]
    rendered: Mapping[str, Sequence[Rendered]]
    findings: tuple[Finding, ...]
    origin: Mapping[str, str]

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def starts_from_probe(self) -> bool:
        """Whether a fresh head is first fitted to what it sees of the training rows."""
        probe = self.recipe.train.head_start == "probe" and self.task.form == "head"
        return probe and not has_trained_head(self.facts, self.task.labels)

    def asking(self, check: Callable[[], None] = nothing) -> Asking:
        """How its model is asked; `check` may interrupt it."""
        compute = functools.partial(autocast, self.device, torch_dtype(self.recipe.model.dtype))
        return Asking(self.renderer, self.device, self.recipe.evaluate.tokens_per_batch, check, compute)

    def measure_baselines(self, names: Sequence[str], asking: Asking) -> dict[str, BaselineResult]:
        """The named baselines on the test rows; the untrained model is loaded when the first one needs it."""
        dtype, section = torch_dtype(self.recipe.model.dtype), self.recipe.evaluate
        return run_baselines(
            names,
            asking,
            train=self.examples["train"],
            dev=self.examples["dev"],
            test=self.examples["test"],
            model_provider=lambda: load_base(self.facts, self.task.form, self.task.labels, self.device, dtype),
            section=section,
            seed=self.recipe.seed,
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows, tokens and trained tokens of each split."""
        return {
            name: {
                "rows": len(self.examples[name]),
                "tokens": sum(len(r.ids) for r in rendered),
                "trained_tokens": sum(sum(r.trained) for r in rendered),
                "longest": max((r.length for r in rendered), default=0),
            }
            for name, rendered in self.rendered.items()
        }


def prepare(recipe: Recipe) -> Job:
    """Reads, checks and renders; loads no weights and writes nothing.

    Raises the errors of each room: RecipeError, MissingFileError, DataError, UnsupportedError.
    """
    check_settings(recipe)
    facts = inspect_model(recipe.model)
    device, _ = choose_device(recipe.model)
    dtype, dtype_reason = choose_dtype(recipe.model, device)
    files = read_files(recipe.data)
    laid_out = recipe.data.model_copy(update={"layout": files.layout})
    try:
        task = make_task(recipe.task, laid_out, facts.kind, files.rows["train"])
    except DataError as error:  # of rows that could not be read it knows nothing
        lost = " ".join(f"{f.message} {f.advice}" for f in files.findings if f.code in LEFT_OUT and f.split == "train")
        if not lost:
            raise
        raise DataError(f"{error} But first: {lost}") from None
    if recipe.data.rows_per_label is not None and not task.labels:
        raise RecipeError(
            f"`data.rows_per_label` needs a task with labels. Received {recipe.task.name}. Try data.train_rows."
        )
    splits, findings = split_rows(task, files, recipe.data)
    check_together(recipe, facts, task)
    if recipe.evaluate.baselines != "auto":
        check_baselines(recipe.evaluate.baselines, task)

    rows, examples = _examples(task, splits, recipe.data, findings)
    findings += check_items(
        *[[as_item(e, task) for e in examples[name]] for name in SPLITS],
        section=recipe.data,
        labels_expected=bool(task.labels),
    )
    findings += _few_rows(examples)
    tokenizer = load_tokenizer(facts)
    room = usable_positions(facts, recipe.adapter)
    limit = min(room, LONGEST_AUTOMATIC) if recipe.model.max_length == "auto" else int(recipe.model.max_length)
    renderer = Renderer(tokenizer, facts.kind, task, limit, recipe.task.chat_template)
    check_objective(recipe.zo.objective, renderer, examples["train"])
    rendered = {name: [r for e in examples[name] for r in renderer.render(e)] for name in SPLITS}
    findings += check_rendered(rendered, task, renderer, recipe.data)
    rendered["train"] = [r for r in rendered["train"] if _teaches(r)]
    if not rendered["train"] and not any(f.level == "error" for f in findings):
        raise DataError("Training needs at least one usable row. Received none. Try `tunefork data check` to see why.")

    now = _situation(recipe, facts, renderer, device, dtype, dtype_reason, rendered, files.layout)
    resolved = resolve(recipe, now)
    found = [Reason(f"data.fields.{k}", v, "found by its name") for k, v in _guessed(task, recipe.data, rows).items()]
    resolved = replace(resolved, reasons=(*resolved.reasons, *found))
    check_together(resolved.recipe, facts, task)  # again, now that the adapter is a name
    return Job(
        resolved, facts, task, tokenizer, renderer, device, rows, examples, rendered, tuple(findings), splits.origin
    )


def check_together(recipe: Recipe, facts: ModelFacts, task: Task) -> None:
    """Raises RecipeError, UnsupportedError or MissingExtraError where method, adapter, model and task do not fit."""
    method, adapter = method_info(recipe.train.method), recipe.adapter.name
    if adapter == "auto":
        return
    if task.objective == "preference" and (adapter not in ("lora", "dora", "qlora") or not method.needs_backward):
        raise RecipeError(
            "A preference is learned by back-propagation in an adapter over a fixed model. Received method "
            f"{method.name} and adapter {adapter}. Try --method backprop --adapter lora."
        )
    checkpointing = recipe.train.activation_checkpointing is True
    check_support(facts, adapter, task.form, method.name, activation_checkpointing=checkpointing)


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Raises DataError listing every finding that is an error."""
    errors = [f for f in findings if f.level == "error"]
    if not errors:
        return
    lines = []
    for finding in errors:
        where = f"{finding.split}: " if finding.split else ""
        shown = "".join(f"\n    {example}" for example in finding.examples[:3])
        lines.append(f"{where}{finding.message} {finding.advice}".rstrip() + shown)
    raise DataError("The data must be usable. Refused because:\n  " + "\n  ".join(lines))


def _guessed(task: Task, section: DataSection, rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Field -> column, of those that the task reads from the first training row and nobody has named."""
    columns = task.columns(rows["train"][0]) if rows["train"] else {}
    return {field: column for field, column in columns.items() if field not in section.fields}


def _examples(
    task: Task, splits: Splits, section: DataSection, findings: list[Finding]
) -> tuple[dict[str, Sequence[Row]], dict[str, Sequence[Example]]]:
    rows: dict[str, Sequence[Row]] = {name: getattr(splits, name) for name in SPLITS}
    examples: dict[str, Sequence[Example]] = {}
    lenient, found = section.model_copy(update={"max_unusable": 1.0}), list[Finding]()
    for name in SPLITS:
        examples[name], more = build_examples(task, rows[name], lenient, labelled=True)
        found += [replace(finding, split=name) for finding in more]
    counts = {name: len(task.rows(part)) for name, part in rows.items()}
    findings += refuse_shares(found, {"unusable-row"}, counts, section, "max_unusable")
    return rows, examples


def _few_rows(examples: Mapping[str, Sequence[Example]]) -> list[Finding]:
    """Splits that are too small to measure much on."""
    found: list[Finding] = []
    for split, least in (("dev", FEW_DEV), ("test", FEW_TEST)):
        n = len(examples[split])
        if not 0 < n < least:
            continue
        off = min(1.0, 0.98 / math.sqrt(n))  # half the widest 95 % interval of a share
        message = f"Only {counted(n, 'row')}: a share measured on so few is uncertain by up to ±{off:.2f}."
        advice = f"Give a larger {split} file, or more training rows to carve it from."
        found.append(Finding("warning", "few-rows", message, n, (), advice, split))
    return found


def _teaches(rendered: Rendered) -> bool:
    """A row from which something is learned: a known answer, or at least one trained token."""
    return rendered.example.gold is not None or any(rendered.trained)


def _situation(
    recipe: Recipe,
    facts: ModelFacts,
    renderer: Renderer,
    device: torch.device,
    dtype: str,
    dtype_reason: str,
    rendered: Mapping[str, Sequence[Rendered]],
    layout: str,
) -> Situation:
    spread = [len(r.candidates) for r in rendered["train"] if r.candidates and r.read_at is None]
    fanned_out = max(spread, default=1) if renderer.objective != "answer" else 1
    return Situation(
        model_kind=facts.kind,
        parameters=facts.parameters,
        max_positions=usable_positions(facts, recipe.adapter),
        max_length=renderer.max_length,
        device=device.type,
        dtype=dtype,
        dtype_reason=dtype_reason,
        kind_reason=f"its config says {facts.architecture}",
        form=renderer.task.form,
        objective=renderer.objective,
        layout=layout,
        targets=functools.partial(adapter_targets, facts, renderer.task.form),
        train_rows=len(rendered["train"]),
        longest=max((r.length for part in rendered.values() for r in part), default=8),
        sequences_per_row=fanned_out,
        has_dev=bool(rendered["dev"]),
        quantized=facts.quantized,
        baselines=fitting_baselines(renderer.task),
        checkpointing_needed=False,
        needs_backward=method_info(recipe.train.method).needs_backward,
        beside=learns_beside(recipe),
        usual_batch=usual_batch(recipe, is_mean(recipe.zo.objective, renderer.task)),
    )
