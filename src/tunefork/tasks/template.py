"""Jinja wording over a row's fields: sandboxed, and an unknown or empty field is an error that names it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tunefork.data.values import is_blank, listed, plain_text, shorten
from tunefork.errors import DataError, RecipeError, did_you_mean


class _NotTextError(TemplateError):
    """A template printed a value that is no text."""


def _printed(value: Any) -> Any:
    """What `{{ value }}` writes. A missing value must not become the word None, nor a list its Python form."""
    if isinstance(value, Undefined):
        return value  # StrictUndefined raises by itself, and says which
    text = plain_text(value)
    if text is None:
        kind = "empty" if is_blank(value) else f"a {type(value).__name__}, not text"
        raise _NotTextError(f"a field it writes is {kind}")
    return text


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=_printed
)


def lower_first_word(text: str) -> str:
    """`Water flowed` as `water flowed`, the word `I` as it is: for continuations of a sentence (COPA in MeZO)."""
    first, space, rest = text.partition(" ")
    return text if first == "I" else first.lower() + space + rest


def upper_first(text: str) -> str:
    """`is it` as `Is it`."""
    return text[:1].upper() + text[1:]


def without_period(text: str) -> str:
    """A sentence without its final period."""
    return text.rstrip().removesuffix(".")


def fingerprint(text: str) -> str:
    """16 letters that stand for a long text: equal for equal texts, and only then."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


_ENVIRONMENT.filters.update(
    lower_first_word=lower_first_word,
    upper_first=upper_first,
    without_period=without_period,
    fingerprint=fingerprint,
)


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


@functools.lru_cache(maxsize=256)
def names_in(text: str) -> frozenset[str]:
    """The fields that a template reads."""
    return frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)))


def fill(text: str, key: str, values: Mapping[str, Any], source: str) -> str:
    """The template with a row's values.

    Raises DataError naming the row and the field that is missing, empty or no text, RecipeError for a bad template.
    """
    template = compiled(text, key)
    try:
        return template.render(values)
    except UndefinedError as error:
        missing = sorted(names_in(text) - set(values))
        if not missing:  # a field of a field
            raise DataError(f"{source}: `{key}` cannot be filled in: {error.message}.") from None
        raise DataError(
            f"{source}: the task reads the field `{missing[0]}`, which the row does not have. It has "
            f"{listed(sorted(map(str, values)))}.{did_you_mean(missing[0], map(str, values))}"
        ) from None
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        wrong = sorted(name for name in names_in(text) & set(values) if plain_text(values[name]) is None)
        shown = f" (`{wrong[0]}` is {shorten(values[wrong[0]], 60)})" if wrong else ""
        raise DataError(f"{source}: `{key}` cannot be filled in: {str(error).rstrip('.')}{shown}.") from None
