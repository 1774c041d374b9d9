"""Jinja wording over a row's fields: sandboxed, and an unknown field is an error that names the likely one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunefork.data.values import listed
from tunefork.errors import DataError, RecipeError, did_you_mean

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


def lower_first(text: str) -> str:
    """`Water flowed` as `water flowed`, for continuations of a sentence (COPA)."""
    return text[:1].lower() + text[1:]


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def without_period(text: str) -> str:
    """A sentence without its final period."""
    return text.rstrip().removesuffix(".")


_ENVIRONMENT.filters.update(lower_first=lower_first, upper_first=upper_first, without_period=without_period)


@functools.lru_cache(maxsize=256)
def compiled(text: str, key: str) -> Template:
    """Raises RecipeError naming the recipe key and line of a template that cannot be read."""
    try:
        return _ENVIRONMENT.from_string(text)
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"`{key}` must be a Jinja template. Received {text!r}: {error.message} (line {error.lineno}). "
            "Try {{ text }} for a column's value."
        ) from None


def names_in(text: str) -> set[str]:
    """The fields that a template reads."""
    return set(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)))


def fill(text: str, key: str, values: Mapping[str, Any], source: str) -> str:
    """The template with a row's values. Raises DataError naming the row and the field that is missing."""
    template = compiled(text, key)
    try:
        return template.render(values)
    except UndefinedError:
        missing = sorted(names_in(text) - set(values))
        name = missing[0] if missing else "?"
        raise DataError(
            f"{source}: the task reads the field `{name}`, which the row does not have. It has "
            f"{listed(sorted(map(str, values)))}.{did_you_mean(name, map(str, values))}"
        ) from None
    except (TemplateError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{source}: `{key}` cannot be filled in: {error}.") from None
