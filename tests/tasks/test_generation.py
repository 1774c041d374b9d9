"""Generation and chat tasks: prompts, answers, references, metrics."""

from typing import Any

import numpy as np
import pytest

from tests.tasks.rows import made, only, rows
from tunefork.data import apply_layout
from tunefork.errors import DataError, RecipeError
from tunefork.recipe.schema import DataSection
from tunefork.tasks import Prediction, build_examples


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "Say hi.", "completion": "Hi!"}, "Say hi.\n", "Hi!"),
        ({"question": "Two?", "answer": 2}, "Two?\n", "2"),
        ({"question": "Two?", "answers": ["2", "two"]}, "Two?\n", "2"),
        ({"text": "Long.", "summary": "Short."}, "Long.\n", "Short."),
        ({"instruction": "Say hi.", "output": "Hi!"}, "Say hi.\n", "Hi!"),
    ],
)
def test_the_usual_columns_need_no_names(row: dict[str, Any], prompt: str, answer: str) -> None:
    example = only(made("generation"), row)
    assert (example.prompt, example.answer) == (prompt, answer)


def test_own_templates_read_any_column_and_an_absent_answer_is_no_answer() -> None:
    task = made("generation", prompt="Translate: {{ en }}\n", answer="{{ fr }}")
    assert only(task, {"en": "yes", "fr": "oui"}).answer == "oui"
    bare = only(task, {"en": "yes"})
    assert bare.answer is None and bare.references == ()
    _, (finding,) = build_examples(task, rows({"en": "yes", "f": "oui"}), DataSection(), labelled=True)
    assert finding.level == "error" and "`f`" in finding.examples[0]


def test_plain_text_can_be_learned_whole() -> None:
    example = only(made("generation", prompt="", answer="{{ text }}"), {"text": "Once upon a time."})
    assert example.prompt == "" and example.answer == "Once upon a time."


def test_the_layout_text_is_free_completion() -> None:
    task = made("generation", data={"layout": "text"})
    (row,), _ = apply_layout(rows({"text": "Once upon a time.", "id": 1}), "text", {})
    example = task.example(row)
    assert (example.prompt, example.answer, example.text) == ("", "Once upon a time.", "Once upon a time.")
    assert task.metrics == ("loss",)
    (asked,), _ = apply_layout(rows({"text": "Once upon"}), "text", {}, answers=False)
    assert (task.example(asked).prompt, task.example(asked).answer) == ("Once upon", None)
    assert made("generation", data={"layout": "text"}, prompt="").example(row) == example
    assert made("generation", data={"layout": "text"}, metric="rougeL").metric == "rougeL"


def test_an_empty_prompt_is_refused_where_nothing_else_shows_the_row() -> None:
    for name in ("generation", "summary"):
        with pytest.raises(RecipeError, match=r"`task\.prompt` must show something.*--layout text"):
            made(name, prompt="")
    with pytest.raises(RecipeError, match=r"`task\.prompt` must show something"):
        made("classification", rows({"text": "a", "label": 0}, {"text": "b", "label": 1}), prompt="")


def test_labels_are_refused_where_there_are_none() -> None:
    with pytest.raises(RecipeError, match=r"`data\.labels` must not be set for generation"):
        made("generation", labels={"0": "a"})


@pytest.mark.parametrize(
    "row", [{"prompt": " ", "completion": "x"}, {"prompt": None, "completion": "x"}, {"completion": "x"}]
)
def test_a_row_without_prompt_is_named(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"a\.csv:2.*prompt"):
        only(made("generation"), row)


def test_an_empty_answer_is_none() -> None:
    assert only(made("generation"), {"prompt": "x", "completion": "  "}).answer is None


def test_every_reference_counts_and_the_best_is_taken() -> None:
    task = made("dialogsum")
    example = only(task, {"dialogue": "A: hi", "summary1": "a greets", "summary2": "a says hi", "summary3": "hello"})
    assert example.references == ("a greets", "a says hi", "hello") and example.answer == " a greets"
    predictions = [
        Prediction("r", "a says hi", None, loss=1.0, references=example.references),
        Prediction("r", "nothing", None, loss=3.0, references=example.references),
    ]
    found = {s.name: s for s in task.statistics(predictions)}
    assert list(found) == ["rougeL", "rouge1", "rouge2", "loss"]
    assert found["rougeL"](np.array([0])) == 1.0 and found["rougeL"](np.array([1])) == 0.0
    assert found["loss"](np.array([0, 1])) == 2.0 and not found["loss"].higher_is_better


def test_a_metric_that_predictions_do_not_know_is_left_out_and_not_made_up() -> None:
    task = made("dialogsum")
    lead = [Prediction("r", "a says hi", None, references=("a greets",))]
    assert [s.name for s in task.statistics(lead)] == ["rougeL", "rouge1", "rouge2"]
    chat = made("chat")
    assert [s.name for s in chat.statistics([Prediction("r", "", None, loss=1.0)])] == ["loss"]
    stopped = [Prediction("r", "x", None, loss=1.0, stopped=s) for s in (True, True, False, True)]
    assert [(s.name, s(np.arange(4))) for s in chat.statistics(stopped)] == [("loss", 1.0), ("stopped", 0.75)]


def test_the_chosen_metric_comes_first_and_an_unknown_one_is_refused() -> None:
    assert made("squad", metric="exact_match").metrics[0] == "exact_match"
    with pytest.raises(RecipeError, match=r"task\.metric.*rougel.*`rougeL`"):
        made("summary", metric="rougel")


def test_final_numbers_need_answers_that_have_one() -> None:
    task = made("gsm8k")
    assert only(task, {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}).answer == " It is 2.\n#### 2"
    with pytest.raises(DataError, match=r"a\.csv:2.*####"):
        only(task, {"question": "1 + 1?", "answer": "It is 2."})


def test_chat_rows_carry_messages_with_weights_and_tools() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    call = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": call, "weight": 0},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "Three.", "weight": 1},
    ]
    example = only(made("chat"), {"messages": messages, "tools": [tool]})
    assert [m.trained for m in example.messages] == [True, False, True, True]
    assert example.messages[1].extra == {"tool_calls": call} and example.tools == (tool,)
    assert example.references == ("Three.",)


@pytest.mark.parametrize(
    "messages", [None, [], "hi", [{"role": "human", "content": "x"}], [{"role": "user", "content": ["x"]}], ["hi"]]
)
def test_chat_rows_of_another_shape_are_named(messages: Any) -> None:
    with pytest.raises(DataError, match=r"a\.csv:2"):
        only(made("chat"), {"messages": messages})
