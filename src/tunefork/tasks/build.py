"""From a recipe to a task, and from rows to examples, with a finding for every row that cannot be used."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from tunefork.data.findings import SHOWN, refuse_above
from tunefork.data.load import Files, split_files
from tunefork.data.rows import Finding, Item, Row, Splits
from tunefork.data.values import counted, listed
from tunefork.errors import DataError, RecipeError, UnsupportedError
from tunefork.recipe.schema import DataSection, ModelKind, TaskSection
from tunefork.tasks.base import Example, Task, TaskInfo
from tunefork.tasks.chat import ChatTask
from tunefork.tasks.choice import ChoiceTask
from tunefork.tasks.labelled import LabelledTask, find_labels
from tunefork.tasks.preference import PreferenceTask
from tunefork.tasks.spec import check_fields, find_spec, list_specs
from tunefork.tasks.text import TextTask

_COLUMNS = "name the right columns with --text-field, --label-field or --set data.fields.NAME=COLUMN"


def list_tasks() -> list[TaskInfo]:
    """Every kind, then every preset."""
    return [spec.info for spec in list_specs()]


def make_task(
    section: TaskSection,
    data: DataSection,
    model_kind: ModelKind,
    rows: Sequence[Row],
    labels: Sequence[str] | None = None,
) -> Task:
    """The task `section.name` for this kind of model. Label names come from `labels` (a trained model's), from
    `data.labels`, from the preset, or from `rows` (the training rows), in this order.

    Raises RecipeError for an unknown task or setting, UnsupportedError for a task this kind of model cannot do,
    DataError when labels are needed and cannot be found.
    """
    free = section.name == "generation" and data.layout == "text" and not section.prompt
    if free and section.prompt is not None:
        section = section.model_copy(update={"prompt": None})
    spec = find_spec(section)
    check_fields(spec, data)
    if data.labels and spec.kind not in ("classification", "scoring"):
        raise RecipeError(
            f"`data.labels` must not be set for {spec.name}, which has no labels. "
            f"Received {listed(list(data.labels))}. Try leaving it out, or --task classification."
        )
    if spec.kind in ("classification", "scoring"):
        names, mapping = find_labels(spec, rows, data, labels)
        return LabelledTask(spec, section, model_kind, names, mapping)
    if model_kind != "causal":
        raise UnsupportedError(
            f"A task of the kind {spec.kind} needs a causal model. Received a model of kind {model_kind}. "
            "Try a causal model, or --task classification."
        )
    if spec.kind == "choice":
        return ChoiceTask(spec, section, rows)
    if spec.kind == "preference":
        return PreferenceTask(spec, section)
    return ChatTask(spec) if spec.kind == "chat" else TextTask(spec, section, free=free)


def build_examples(
    task: Task, rows: Sequence[Row], section: DataSection, *, labelled: bool
) -> tuple[list[Example], list[Finding]]:
    """An example a usable row. With `labelled`, a row without its answer is unusable too; else answers are ignored.

    Unusable rows are counted and named in the findings, which are errors where they exceed `section.max_unusable`.
    """
    examples: list[Example] = []
    bad: list[str] = []
    positions = 0
    parts = task.rows(rows)
    for row in parts:
        try:
            example = task.example(row, labelled=labelled)
        except DataError as error:
            bad.append(str(error))
            continue
        if labelled and not _answered(example):
            filled = sorted(name for name, value in row.values.items() if value not in (None, ""))
            bad.append(f"{row.source}: no label or answer; filled in are {listed(filled)}")
            continue
        examples.append(example)
        positions += labelled and isinstance(task, ChoiceTask) and task.by_position(row)
    notes: list[Finding] = []
    if positions:
        text = f"{counted(positions, 'right answer')} read as positions of the choices, counted from 0."
        notes.append(Finding("info", "right-by-position", text, positions, (), "Write the text of the choice if not."))
    if not bad:
        return examples, notes
    finding = Finding(
        "warning",
        "unusable-row",
        f"{counted(len(bad), 'row')} left out: the task cannot use them.",
        len(bad),
        tuple(bad[:SHOWN]),
        f"Mend these rows, or {_COLUMNS if task.form != 'chat' else 'choose another --task'}.",
    )
    return examples, notes + refuse_above([finding], {"unusable-row"}, len(parts), section.max_unusable, "max_unusable")


def split_rows(task: Task, files: Files, section: DataSection) -> tuple[Splits, list[Finding]]:
    """The files' rows by use, where dev and test are carved by the task's labels and equal texts stay together."""

    def texts(row: Row) -> list[str]:
        found = []
        for part in task.rows([row]):
            with contextlib.suppress(DataError):  # a row that cannot be used is counted where examples are built
                found.append(item_text(task.example(part)))
        return found

    return split_files(files, section, section.split_seed, task.label_of if task.labels else None, texts)


def item_text(example: Example) -> str:
    """The text by which two rows are the same."""
    return example.text or example.prompt


def as_item(example: Example, task: Task) -> Item:
    """The row as the check of rows sees it."""
    label = None
    if example.gold is not None:
        label = task.labels[example.gold] if task.labels else str(example.gold)
    return Item(example.source, item_text(example), label, example.group)


def _answered(example: Example) -> bool:
    return (
        example.gold is not None or example.answer is not None or any(m.role == "assistant" for m in example.messages)
    )
