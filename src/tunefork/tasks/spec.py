"""What a task is, as data: a kind's defaults and every preset are files of this one form."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import yaml
from pydantic import Field, ValidationError

from tunefork.data.rows import Row
from tunefork.errors import RecipeError, did_you_mean
from tunefork.recipe.schema import Section, TaskKind, TaskSection


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
    references: tuple[str, ...] = ()  # fields with one or several acceptable answers; the answer itself when empty
    metrics: tuple[str, ...]  # the first chooses the best checkpoint
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 64


def list_specs() -> list[TaskSpec]:
    """The kinds, then the presets, each in order of name."""
    return [_load(name) for name in (*_names("kinds"), *_names("presets"))]


def find_spec(section: TaskSection) -> TaskSpec:
    """The kind or preset `section.name`, with what the section sets laid over it.

    Raises RecipeError with a did-you-mean for an unknown name.
    """
    known = [*_names("kinds"), *_names("presets")]
    if section.name not in known:
        raise RecipeError(
            f"`task.name` must be a kind or a preset. Received {section.name!r}."
            + (did_you_mean(section.name, known) or " `tunefork tasks` lists them.")
        )
    spec = _load(section.name)
    changes: dict[str, Any] = {
        key: getattr(section, key)
        for key in ("prompt", "masked_prompt", "choices", "answer", "stop", "max_new_tokens")
        if getattr(section, key) is not None
    }
    if section.metric is not None:
        changes["metrics"] = (section.metric, *(m for m in spec.metrics if m != section.metric))
    return spec.model_copy(update=changes)


def unrolled(spec: TaskSpec, row: Row) -> list[Row]:
    """One row a question: the items of the nested lists `spec.unroll` names, with the outer values beside theirs."""
    rows = [dict(row.values)]
    opened = False
    for path in spec.unroll:
        deeper: list[dict[str, Any]] = []
        for values in rows:
            items = look_up(values, path)
            if isinstance(items, list):
                opened = True
                deeper += [{**values, **item} for item in items if isinstance(item, Mapping)]
            else:
                deeper.append(values)
        rows = deeper
    if not opened:
        return [row]
    return [Row(values, row.file, row.line, part) for part, values in enumerate(rows, 1)]


def named_values(spec: TaskSpec, row: Row) -> dict[str, Any]:
    """The row's values with the spec's field names added, each from the first of its columns that is there."""
    values = dict(row.values)
    found = {}
    for name, columns in spec.fields.items():
        for column in columns:
            value = look_up(values, column)
            if value is not None:
                found[name] = value
                break
    return {**values, **found}


def look_up(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    if path in values:
        return values[path]
    inside: Any = values
    for part in path.split("."):
        if not isinstance(inside, Mapping) or part not in inside:
            return None
        inside = inside[part]
    return inside


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
