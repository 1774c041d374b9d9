"""Wording: what a template may do, and what it says when it cannot."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tasks.rows import made
from tunefork.errors import DataError, RecipeError
from tunefork.tasks.template import fill


@pytest.mark.parametrize(
    ("template", "values", "sentence"),
    [
        ("{{ tezt }}", {"text": "x"}, "field `tezt`.*Did you mean `text`"),
        ("{{ text }}", {"text": None}, "empty.*`text`"),
        ("{{ text }}", {"text": float("nan")}, "empty.*`text`"),
        ("{{ text }}", {"text": ["x"]}, "list, not text"),
        ("{{ text.part }}", {"text": {}}, "no attribute 'part'"),
        ("{{ 1 / 0 }}", {}, "division"),
        ("{{ text.__class__.__mro__ }}", {"text": "x"}, "unsafe"),
        ("{{ range(1000000000) | list }}", {}, "Range too big"),
    ],
)
def test_a_row_that_cannot_be_filled_in_is_named(template: str, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=r"(?s)^a\.csv:2: .*" + sentence):
        fill(template, "task.prompt", values, "a.csv:2")


@pytest.mark.parametrize("template", ["{{ text", "{% if %}", "{{ text | nosuch }}"])
def test_a_template_that_cannot_be_read_is_refused_before_any_row(template: str) -> None:
    with pytest.raises(RecipeError, match=r"`task\.prompt` must be a Jinja template"):
        made("sst2", prompt=template)


def test_a_template_cannot_change_the_row() -> None:
    values = {"items": ["x"]}
    with pytest.raises(DataError):
        fill("{{ items.append('y') }}", "task.prompt", values, "row")
    assert values == {"items": ["x"]}


@given(st.text())
def test_a_value_is_written_as_it_is(text: str) -> None:
    assert fill("{{ text }}\n", "task.prompt", {"text": text}, "row") == text + "\n"


def test_settings_a_kind_has_no_use_for_are_refused() -> None:
    for name, setting in (
        ("sst2", {"answer": "{{ x }}"}),
        ("sst2", {"max_new_tokens": 9}),
        ("gsm8k", {"objective": "candidates"}),
        ("chat", {"prompt": "{{ x }}"}),
        ("copa", {"form": "head"}),
    ):
        with pytest.raises(RecipeError, match=f"task.{next(iter(setting))}. must not be set"):
            made(name, **setting)
    assert made("sst2", form="auto", objective="auto", answer=None).form == "verbalizer"


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="Did you mean `sst2`"):
        made("sst-2")
