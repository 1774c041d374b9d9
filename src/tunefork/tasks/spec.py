"""What a task is, as data: a kind's defaults and every preset are files of this one form."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError

from tunefork.data.layouts import NAMES
from tunefork.data.rows import Row
from tunefork.data.values import look_up
from tunefork.errors import RecipeError, did_you_mean
from tunefork.recipe.schema import DataSection, Section, TaskKind, TaskSection
from tunefork.tasks.base import Objective, TaskInfo
from tunefork.tasks.template import compiled, fill, names_in

_LABELLED = frozenset({"prompt", "masked_prompt", "form", "objective", "metric", "chat_template"})
_SETTINGS: Mapping[TaskKind, frozenset[str]] = {  # of the recipe's `task`, by the kinds that use them
    "classification": _LABELLED,
    "scoring": _LABELLED,
    "choice": frozenset({"prompt", "choices", "objective", "metric", "chat_template"}),
    "generation": frozenset({"prompt", "answer", "stop", "max_new_tokens", "metric", "chat_template"}),
    "chat": frozenset({"stop", "max_new_tokens", "metric", "chat_template"}),
    "preference": frozenset({"beta", "metric"}),
}


class TaskSpec(Section):
    """A task's wording, columns and metrics. Templates are Jinja over the row's fields."""

    name: str
    kind: TaskKind
    summary: str
    source: str = ""  # where the wording comes from
    unroll: tuple[str, ...] = ()  # nested lists, outermost first; each item's keys join the row
    fields: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # name -> columns it may stand in, first found
    group: str = ""  # template; rows of one group are resampled together
    text: str = "{{ text }}"  # the bare text, for word-count baselines and heads
    prompt: str = ""
    masked_prompt: str = ""
    labels: dict[str, str] | None = None  # value in the file -> word shown to the model
    choices: str | tuple[str, ...] = ()  # the field that lists them, or a template each
    choice_value: str = "{{ choice }}"  # what a choice is, for comparing with the right ones
    choice: str = " {{ value }}"  # how it follows the prompt
    right: str = "label"  # field with the index or text of the right choice, or a list of right texts
    answer: str = ""  # template of the text to be generated
    references: tuple[str, ...] = ()  # fields with one or several acceptable answers; none: the answer itself
    metrics: tuple[str, ...]  # the first chooses the best checkpoint
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 64

    @property
    def info(self) -> TaskInfo:
        return TaskInfo(self.name, self.kind, self.summary, self.metrics[0], self.source)

    def wording(self) -> dict[str, Any]:
        """What decides the text a model is shown, as JSON."""
        keys = ("prompt", "masked_prompt", "choices", "choice_value", "choice", "answer", "text")
        return {key: value for key, value in self.model_dump(mode="json", include=set(keys)).items() if value}


class SpecTask:
    """What every task takes from its spec. Raises RecipeError for a metric that is not among `known`."""

    labels: tuple[str, ...] = ()
    objective: Objective = "answer"
    automatic_objective = True
    beta: float | None = None

    def __init__(self, spec: TaskSpec, known: Collection[str]) -> None:
        for metric in spec.metrics:
            if metric not in known:
                raise RecipeError(
                    f"`task.metric` must be one of {', '.join(known)} for {spec.kind}. Received {metric!r}."
                    f"{did_you_mean(metric, known)}"
                )
        self.spec, self.info, self.known = spec, spec.info, tuple(known)
        self.metrics, self.metric = spec.metrics, spec.metrics[0]
        self.stop, self.max_new_tokens = spec.stop, spec.max_new_tokens
        self.wording: Mapping[str, Any] = spec.wording()

    def measured_by(self, metric: str) -> Self:
        """The same task with this metric alone. Raises RecipeError for one it does not have."""
        if metric not in self.known:
            raise RecipeError(
                f"A metric of {self.spec.kind} must be one of {', '.join(self.known)}. Received {metric!r}."
                f"{did_you_mean(metric, self.known)}"
            )
        other = copy.copy(self)
        other.metric, other.metrics = metric, (metric,)
        return other

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """One row a question."""
        return [part for row in rows for part in unrolled(self.spec, row)]

    def columns(self, row: Row) -> dict[str, str]:
        """Field -> the column of the row that it is read from, where there is one."""
        (first, *_) = self.rows([row])
        named = {name: _column(first.values, name, columns) for name, columns in self.spec.fields.items()}
        return {name: found[0] for name, found in named.items() if found is not None}

    def label_of(self, row: Row) -> str | None:
        """Answers in free text and positions of right ones are nothing to stratify by."""
        return None


def list_specs() -> list[TaskSpec]:
    """The kinds, then the presets, each in order of name."""
    return [_load(name) for name in (*_names("kinds"), *_names("presets"))]


def find_spec(section: TaskSection) -> TaskSpec:
    """The kind or preset `section.name`, with what the section sets laid over it.

    Raises RecipeError for an unknown name (with a did-you-mean), a setting that this kind of task has no use for,
    and a template that cannot be read.
    """
    known = [*_names("kinds"), *_names("presets")]
    if section.name not in known:
        raise RecipeError(
            f"`task.name` must be a kind or a preset. Received {section.name!r}."
            + (did_you_mean(section.name, known) or " `tunefork tasks` lists them.")
        )
    spec = _load(section.name)
    idle = [key for key in sorted(section.model_fields_set - {"name"}) if _set(section, key) - _SETTINGS[spec.kind]]
    if idle:
        uses = ", ".join(sorted(_SETTINGS[spec.kind]))
        raise RecipeError(
            f"`task.{idle[0]}` must not be set for {spec.kind}, which has no use for it. "
            f"Received {getattr(section, idle[0])!r}. Try one of {uses}, or leave it out."
        )
    changes: dict[str, Any] = {
        key: getattr(section, key)
        for key in ("prompt", "masked_prompt", "choices", "answer", "stop", "max_new_tokens")
        if getattr(section, key) is not None
    }
    if section.metric is not None:
        changes["metrics"] = (section.metric, *(m for m in spec.metrics if m != section.metric))
    spec = spec.model_copy(update=changes)
    for key in ("text", "group", "prompt", "masked_prompt", "choice_value", "choice", "answer"):
        compiled(getattr(spec, key), f"task.{key}")
    for template in () if isinstance(spec.choices, str) else spec.choices:
        compiled(template, "task.choices")
    whole = spec.kind == "generation" and section.prompt == "" and section.answer is not None  # a text without prompt
    if section.prompt is not None and not names_in(section.prompt) and not whole:
        text = " For texts without a prompt, try --layout text." if spec.kind == "generation" else ""
        raise RecipeError(
            f"`task.prompt` must show something of the row. Received {section.prompt!r}, the same for every row. "
            f"Try {{{{ text }}}}, or another column, in it.{text}"
        )
    return spec


def check_fields(spec: TaskSpec, data: DataSection) -> None:
    """Raises RecipeError for a name in `data.fields` under which the task looks for nothing."""
    templates = (spec.text, spec.group, spec.prompt, spec.masked_prompt, spec.choice_value, spec.choice, spec.answer)
    choices = () if isinstance(spec.choices, str) else spec.choices
    read = {name for template in (*templates, *choices) for name in names_in(template)} | set(spec.fields)
    read |= {spec.right, *spec.references, *([spec.choices] if isinstance(spec.choices, str) else [])}
    known = read | NAMES | {column for columns in spec.fields.values() for column in columns} | set(spec.unroll)
    for name in data.fields:
        if name not in known and name != data.group_field:
            asked = list(spec.fields) or sorted(read & NAMES)
            raise RecipeError(
                f"`data.fields` must name what the task reads: {', '.join(asked)}. Received {name!r}, which "
                f"{spec.name} does not read.{did_you_mean(name, sorted(known))}"
            )


def _set(section: TaskSection, key: str) -> set[str]:
    """`key` as a set if the section really sets it: its default says nothing, and null in a kept recipe neither."""
    return {key} if getattr(section, key) not in (TaskSection.model_fields[key].default, None) else set()


def unrolled(spec: TaskSpec, row: Row) -> list[Row]:
    """One row a question: the items of the nested lists `spec.unroll` names, with the outer values beside theirs."""
    rows = [dict(row.values)]
    opened = False
    for path in spec.unroll:
        deeper: list[dict[str, Any]] = []
        for values in rows:
            items = look_up(values, path)
            if isinstance(items, list) and items and all(isinstance(item, Mapping) for item in items):
                opened = True
                deeper += [{**values, **item} for item in items]
            else:
                deeper.append(values)  # perhaps unrolled already; if not, a field will be missing and named
        rows = deeper
    if not opened:
        return [row]
    return [Row(values, row.file, row.line, part) for part, values in enumerate(rows, 1)]


def named_values(spec: TaskSpec, row: Row) -> dict[str, Any]:
    """The row's values with the spec's field names added, each from the first of its columns that is there.

    The field's own name comes first: the data room puts a column named by the recipe (`data.fields`) there. A column
    that is called so but for capitals comes after all that are called so exactly.
    """
    found = {name: found[1] for name, columns in spec.fields.items() if (found := _column(row.values, name, columns))}
    return {**row.values, **found}


def _column(values: Mapping[str, Any], name: str, columns: Sequence[str]) -> tuple[str, Any] | None:
    """The first of the columns that has a value, and the value."""
    for column in (name, *columns):
        if (value := look_up(values, column)) is not None:
            return column, value
    small = {str(column).lower(): column for column in values}
    there = [small[column.lower()] for column in (name, *columns) if column.lower() in small]
    return next(((column, values[column]) for column in there if values[column] is not None), None)


def group_of(spec: TaskSpec, values: Mapping[str, Any], source: str) -> str:
    """The name of the row's group, empty where the task has none."""
    return fill(spec.group, "task.group", values, source) if spec.group else ""


def _folder(name: str) -> Traversable:
    return files("tunefork.tasks") / name


@functools.cache
def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(f.name.removesuffix(".yaml") for f in _folder(folder).iterdir() if f.name.endswith(".yaml")))


@functools.cache
def _load(name: str) -> TaskSpec:
    folder = "kinds" if name in _names("kinds") else "presets"
    tree = yaml.safe_load((_folder(folder) / f"{name}.yaml").read_text(encoding="utf-8"))
    try:
        return TaskSpec.model_validate({"name": name, **tree})
    except ValidationError as error:
        raise RecipeError(f"The preset {name}.yaml must be a task. Received: {error}.") from None
