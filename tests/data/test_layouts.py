"""Layouts: told from keys, brought to one set of names, conversations validated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.data.test_text_files import found
from tunefork.data import Finding, Row, apply_layout, detect_layout
from tunefork.errors import DataError


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(v, "a.jsonl", i) for i, v in enumerate(values, 1)]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def turns(*pairs: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **more}


GOOD = chat(said("user", "hi"), said("assistant", "hello"))


@pytest.mark.parametrize(
    ("values", "layout"),
    [
        ([{"text": "a"}], "text"),
        ([{"text": "a", "label": 1}, {"text": "b"}], "columns"),
        ([{"prompt": "a", "completion": "b", "id": 1}, {"prompt": "c"}], "prompt_completion"),
        ([{"instruction": "a", "input": "", "output": "b"}], "alpaca"),
        ([GOOD], "openai"),
        ([GOOD, {"messages": None}], "openai"),
        ([{"messages": "a text message", "label": "spam"}], "columns"),
        ([turns(("human", "a"), ("gpt", "b"))], "sharegpt"),
        ([GOOD, chat(said("human", "a"), said("gpt", "b"))], "sharegpt"),
        ([{"messages": [{"from": "human", "value": "a"}]}], "sharegpt"),
    ],
)
def test_layouts_are_told_from_keys(values: list[dict[str, Any]], layout: str) -> None:
    assert detect_layout(rows(*values)) == layout


@pytest.mark.parametrize(
    "second", [{"prompt": "a", "completion": "b"}, {"text": "a", "label": 1}, turns(("human", "a"), ("gpt", "b"))]
)
def test_mixed_layouts_name_the_first_offending_row(second: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"share one layout. Received openai \(a\.jsonl:1\) and, from a\.jsonl:3"):
        detect_layout(rows(GOOD, GOOD, second, second))


def laid_out(values: dict[str, Any], layout: Any = "auto", **more: Any) -> dict[str, Any]:
    out, findings = apply_layout(rows(values), layout, more.pop("fields", {}), **more)
    assert not [f for f in findings if f.level != "info"], findings
    return dict(out[0].values)


def left_out(values: dict[str, Any], layout: Any = "auto", **more: Any) -> Finding:
    """The finding about a row that is left out while a good one beside it stays."""
    good = {"openai": GOOD, "sharegpt": GOOD, "text": {"text": "fine"}, "alpaca": {"instruction": "a", "output": "b"}}
    layout = layout if layout != "auto" else "openai"
    out, findings = apply_layout(rows(good[layout], values), layout, {}, **more)
    assert [r.line for r in out] == [1]
    (finding,) = [f for f in findings if f.level == "warning"]
    assert finding.count == 1
    assert finding.examples[0].startswith("a.jsonl:2")
    return finding


def test_fields_add_the_tasks_names_to_the_columns() -> None:
    values = laid_out({"review": "good", "meta": {"stars": 5}}, fields={"text": "review", "label": "meta.stars"})
    assert values == {"review": "good", "meta": {"stars": 5}, "text": "good", "label": 5}


def test_fields_may_exchange_columns() -> None:
    assert laid_out({"text": "a", "label": "b"}, "columns", fields={"text": "label", "label": "text"}) == {
        "text": "b",
        "label": "a",
    }


def test_fields_come_before_the_layout() -> None:
    values = laid_out({"q": "why", "a": "so"}, fields={"prompt": "q", "completion": "a"})
    assert (values["prompt"], values["completion"]) == ("why", "so")


def test_a_column_no_row_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"column `revew` \(data\.fields\.text\).*Did you mean `review`\?"):
        apply_layout(rows({"review": "a", "stars": 1}), "auto", {"text": "revew"})


def test_a_column_some_row_lacks_leaves_that_row_out() -> None:
    out, findings = apply_layout(rows({"t": "a", "l": 1}, {"t": "b"}), "columns", {"text": "t", "label": "l"})
    assert [r.line for r in out] == [1]
    assert found(findings, "missing-field").examples == ("a.jsonl:2: no `l`",)


def test_without_answers_label_columns_may_be_missing() -> None:
    fields = {"text": "t", "label": "l"}
    out, findings = apply_layout(rows({"t": "a"}, {"t": "b"}), "columns", fields, answers=False)
    assert [dict(r.values) for r in out] == [{"t": "a", "text": "a"}, {"t": "b", "text": "b"}]
    assert findings == []
    with pytest.raises(DataError, match="must have the column"):
        apply_layout(rows({"z": "a"}), "columns", fields, answers=False)


def test_alpaca_joins_instruction_and_input() -> None:
    values = laid_out({"instruction": "Translate.", "input": "Hund", "output": "dog"})
    assert values == {
        "instruction": "Translate.",
        "input": "Hund",
        "output": "dog",
        "prompt": "Translate.\n\nHund",
        "completion": "dog",
    }
    assert laid_out({"instruction": "Say a number.", "input": " ", "output": 4})["completion"] == "4"
    assert laid_out({"instruction": "Say a number.", "input": None, "output": 4})["prompt"] == "Say a number."


def test_missing_empty_and_other_than_text_fields_are_left_out() -> None:
    assert left_out({"text": " "}, "text").code == "empty-field"
    assert left_out({"text": ["a"]}, "text").code == "not-text"
    assert left_out({"text": float("nan")}, "text").code == "empty-field"
    assert left_out({"instruction": "a"}, "alpaca").examples[0].endswith("no `output`")
    assert left_out({"instruction": "a", "output": None}, "alpaca").code == "empty-field"
    assert left_out({"instruction": "a", "input": {"b": 1}, "output": "c"}, "alpaca").code == "not-text"


def test_without_answers_a_completion_may_be_missing() -> None:
    assert laid_out({"prompt": "a", "completion": ""}, answers=False) == {"prompt": "a"}
    assert laid_out({"prompt": "a", "completion": ["b"]}, answers=False) == {"prompt": "a"}
    assert laid_out({"instruction": "a"}, "alpaca", answers=False)["prompt"] == "a"


def test_sharegpt_roles_are_mapped_and_said() -> None:
    values = turns(("system", "Be kind."), ("human", "hi"), ("gpt", "hello"), ("human", "bye"), ("gpt", "bye"))
    out, findings = apply_layout(rows(values), "auto", {})
    assert [(m["role"], m["content"]) for m in out[0].values["messages"]] == [
        ("system", "Be kind."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "bye"),
        ("assistant", "bye"),
    ]
    mapped = found(findings, "roles-mapped")
    assert (mapped.level, mapped.count) == ("info", 4)
    assert "`human` to `user` (2)" in mapped.message


def test_sharegpt_system_and_tools_columns() -> None:
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    call = json.dumps({"name": "look_up", "arguments": {"word": "fork"}})
    spoken = (("human", "fork?"), ("function_call", call), ("observation", "a tool"), ("gpt", "A tool."))
    values = laid_out(turns(*spoken, system="Use tools.", tools=json.dumps(tools)))
    assert values["tools"] == tools
    assert [m["role"] for m in values["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert values["messages"][2] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "fork"}}}],
    }
    assert "tools" not in laid_out(turns(("human", "a"), ("gpt", "b"), tools=""))


@pytest.mark.parametrize(
    ("values", "layout", "says"),
    [
        (turns(("humann", "a"), ("gpt", "b")), "sharegpt", "Received `humann` in message 1. Did you mean `human`?"),
        (
            chat(said("User", "a"), said("assistant", "b")),
            "openai",
            "Received `User` in message 1. Did you mean `user`?",
        ),
        (chat(said("user", "a"), said("gpt", "b")), "openai", "Received `gpt` in message 2. Try data.layout=sharegpt"),
    ],
)
def test_unknown_roles_are_refused_by_name(values: dict[str, Any], layout: Any, says: str) -> None:
    with pytest.raises(DataError) as refusal:
        apply_layout(rows(values), layout, {})
    assert says in str(refusal.value)
    assert "a.jsonl:1" in str(refusal.value)


def test_openai_messages_keep_weight_names_and_calls() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    values = laid_out(
        chat(
            said("developer", "Be brief."),
            said("user", [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}], name="Ada"),
            said("assistant", None, tool_calls=[call], weight=0),
            said("tool", "", tool_call_id="c1"),
            said("assistant", "done", weight=1, name=None),
        )
    )
    system, user, calling, tool, reply = values["messages"]
    assert system["role"] == "system"
    assert user == {"role": "user", "content": "two\nparts", "name": "Ada"}
    assert calling["tool_calls"] == [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert (calling["content"], calling["weight"]) == ("", 0)
    assert tool == {"role": "tool", "content": "", "tool_call_id": "c1"}
    assert reply == {"role": "assistant", "content": "done", "weight": 1}


def test_openais_older_function_calls() -> None:
    older = chat(
        said("user", "x?"),
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        said("function", "1", name="f"),
        said("assistant", "1"),
    )
    messages = laid_out(older)["messages"]
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert messages[2]["role"] == "tool"


USER, REPLY = said("user", "hi"), said("assistant", "hello")


@pytest.mark.parametrize(
    ("values", "code", "says"),
    [
        ({"messages": []}, "empty-message", "is empty"),
        ({"messages": {"role": "user"}}, "missing-field", "no list"),
        ({"id": 1}, "missing-field", "no list"),
        (chat("hi", REPLY), "bad-message", "message 1 is not an object"),  # type: ignore[arg-type]
        (chat({"content": "hi"}, REPLY), "bad-message", "message 1 has no role"),
        (chat(said("user", 5), REPLY), "bad-message", "must be text, and is int"),
        (chat(said("user", None), REPLY), "bad-message", "and is nothing"),
        (chat(said("user", [{"type": "image_url"}]), REPLY), "bad-message", "a part that is not text"),
        (chat(said("user", " "), REPLY), "empty-message", "message 1, of the user"),
        (chat(USER, said("assistant", "")), "empty-message", "message 2, of the assistant"),
        (chat(USER, said("assistant", "a", weight=0.5)), "bad-message", "`weight` of message 2 is 0.5"),
        (chat(USER, said("assistant", "a", weight="1")), "bad-message", "`weight` of message 2 is '1'"),
        (chat(USER, said("assistant", "a", weight=True)), "bad-message", "`weight` of message 2 is True"),
        (chat(USER, said("assistant", "a", weight=0)), "nothing-to-train", "`weight` 0"),
        (chat(USER), "nothing-to-train", "the last message is the user's"),
        (chat(USER, REPLY, said("tool", "x")), "nothing-to-train", "the tool's"),
        (chat(said("system", "a")), "nothing-to-train", "the system's"),
        (chat(USER, said("assistant", None, tool_calls=[{"name": 1}])), "bad-message", "must hold calls"),
        (chat(USER, REPLY, tools="not json"), "bad-message", "`tools` must be a list"),
    ],
)
def test_conversations_that_cannot_be_used_are_left_out(values: dict[str, Any], code: str, says: str) -> None:
    finding = left_out(values)
    assert finding.code == code
    assert says in finding.examples[0]


def test_function_calls_that_are_no_json_are_left_out() -> None:
    values = turns(("human", "a"), ("function_call", "look it up!"), ("observation", "b"), ("gpt", "c"))
    assert left_out(values, "sharegpt").code == "bad-message"


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([USER, USER, REPLY], "user-twice"),
        ([REPLY, USER, REPLY], "assistant-first"),
        ([USER, said("system", "a"), REPLY], "late-system"),
        ([said("system", ""), USER, REPLY], "empty-system"),
    ],
)
def test_odd_conversations_are_kept_and_said(messages: list[dict[str, Any]], code: str) -> None:
    out, findings = apply_layout(rows(chat(*messages)), "openai", {})
    assert len(out) == 1
    assert [f.code for f in findings] == [code]


def test_two_replies_in_a_row_and_unlearned_empty_ones_are_nothing_to_speak_of() -> None:
    _, findings = apply_layout(
        rows(chat(USER, REPLY, REPLY), chat(USER, said("assistant", "", weight=0), REPLY)), "openai", {}
    )
    assert findings == []


def test_swapped_roles_are_an_error_of_their_own() -> None:
    swapped = chat(said("system", "s"), said("assistant", "a question"), said("user", "an answer"))
    out, findings = apply_layout(rows(swapped, swapped, GOOD), "openai", {})
    assert len(out) == 1
    finding = found(findings, "swapped-roles")
    assert finding.level == "error"
    assert "2 of 3 conversations" in finding.message


def test_without_answers_a_conversation_may_end_with_the_user() -> None:
    assert laid_out(chat(USER), answers=False)["messages"] == [USER]
