"""Training files of four services: what each takes, what each refuses, and that they are what the model is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunefork.cli import main
from tunefork.errors import DataError, RecipeError
from tunefork.hosted.formats import check_lines, find_format, in_format
from tunefork.recipe import make_recipe
from tunefork.workflows import check_data, export_lines, plan_hosted


def chat(*roles: str, **extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x", **extra} for role in roles]}


def refused(service: str, *lines: dict[str, Any], split: str = "dev") -> list[str]:
    found = check_lines(find_format(service), lines, [f"f:{i}" for i in range(len(lines))], split)
    return [finding.code for finding in found]


@pytest.mark.parametrize(
    ("line", "takers"),
    [
        (chat("user", "assistant"), "openai together fireworks mistral nebius"),
        (chat("system", "user", "assistant"), "openai together fireworks mistral nebius"),
        (chat("user", "system", "assistant"), "openai nebius"),
        (chat("user", "user", "assistant"), "openai fireworks mistral nebius"),
        (chat("system", "assistant", "user", "assistant"), "openai fireworks nebius"),
        (chat("assistant", "user", "assistant"), "openai fireworks nebius"),
        (chat("developer", "user", "assistant"), "openai"),
        (chat("user", "assistant", "user"), ""),
        (chat("user", "assistant", weight=0), ""),
        (chat("user", "assistant", content=" "), ""),
        (
            {
                "input": chat("user"),
                "preferred_output": chat("assistant")["messages"],
                "non_preferred_output": chat("assistant")["messages"],
            },
            "openai together fireworks",
        ),
        (
            {
                "input": chat("user", "assistant", "user"),
                "preferred_output": chat("assistant")["messages"],
                "non_preferred_output": chat("assistant")["messages"],
            },
            "openai together",
        ),
        (
            {
                "input": chat("user", "assistant"),
                "preferred_output": chat("assistant")["messages"],
                "non_preferred_output": chat("assistant")["messages"],
            },
            "",
        ),
    ],
)
def test_each_service_takes_what_it_says(line: dict[str, Any], takers: str) -> None:
    services = ("openai", "together", "fireworks", "mistral", "nebius")
    taking = [name for name in services if not refused(name, line)]
    assert taking == takers.split()


def called(*ids: str, results: tuple[str, ...], name: str = "f", text: str = "", **tool: Any) -> dict[str, Any]:
    """A conversation with calls, their results, and, after results, a last word."""
    calls = [{"id": i, "type": "function", "function": {"name": name, "arguments": "{}"}} for i in ids]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    messages += [{"role": "assistant", "content": text, "tool_calls": calls}]
    messages += [{"role": "tool", "content": "2", **({"tool_call_id": i} if i else {})} for i in results]
    messages += [{"role": "assistant", "content": "two"}] if results else []
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": {k: v for k, v in (function | tool).items() if v is not None}}]
    return {"messages": messages, "tools": tools}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (called("a", results=("a",)), ""),
        (called("a", "b", results=("a", "b")), ""),
        (called("a", results=()), ""),
        (called("a", results=("a",), text="so"), "both text and calls"),
        (called("a", "b", results=("a",)), "before every call has its result"),
        (called("a", results=("a", "b")), "answers no call"),
        (called("a", results=("",)), "which call it answers"),
        (called("a", "b", results=()), "several calls at the end"),
        (called("a", results=("a",), name="f 1"), "no name for a function"),
        (called("a", results=("a",), description=None), "name, description and parameters"),
    ],
)
def test_calls_are_written_and_checked_as_mistral_wants_them(line: dict[str, Any], wrong: str) -> None:
    """What mistral-common 1.3.4, with which mistral-finetune checks a file, refuses is refused here."""
    mistral = find_format("mistral")
    (sent,) = in_format(mistral, [line])
    ids = [call["id"] for m in sent["messages"] for call in m.get("tool_calls", ())]
    results = [m["tool_call_id"] for m in sent["messages"] if m.get("tool_call_id")]
    assert all(len(id) == 9 and id.isalnum() for id in (*ids, *results))
    assert wrong or not results or ids == results
    found = check_lines(mistral, [sent], ["f:1"], "dev")
    assert [wrong in example for finding in found for example in finding.examples] == [True] * bool(wrong)
    assert in_format(find_format("openai"), [line]) == [line]


def test_a_call_is_no_end_at_nebius() -> None:
    assert refused("nebius", called("a", results=())) == ["refused-by-service"]
    assert refused("nebius", called("a", results=("a",))) == []
    assert refused("fireworks", called("a", results=())) == []


def test_a_validation_file_is_small_beside_its_training_file() -> None:
    line = chat("user", "assistant")
    (found,) = check_lines(find_format("mistral"), [line], ["f:1"], "dev", train_bytes=200)
    assert (found.level, found.code) == ("warning", "large-for-its-training-file")
    assert not check_lines(find_format("mistral"), [line], ["f:1"], "dev", train_bytes=20_000)


def test_how_many_and_how_large() -> None:
    line = chat("user", "assistant")
    assert refused("openai", *[line] * 9, split="train") == ["too-few-or-many"]
    assert refused("openai", *[line] * 10, split="train") == []
    assert refused("fireworks", line, line, split="train") == ["too-few-or-many"]
    long = {"messages": [{"role": "user", "content": "x" * 2**21}, {"role": "assistant", "content": "y"}]}
    assert refused("mistral", long) == ["file-too-large"]
    assert refused("mistral", long, split="train") == []
    with pytest.raises(RecipeError, match="Did you mean `together`"):
        find_format("togehter")


def rows(folder: Path, count: int = 30) -> str:
    file = folder / "r.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}", "label": "ab"[i % 2]}) + "\n" for i in range(count)))
    return str(file)


def test_what_is_exported_is_what_the_model_is_asked(tmp_path: Path) -> None:
    recipe = make_recipe({"model": "openai:gpt-4.1-mini", "task": "classification", "data": {"train": rows(tmp_path)}})
    paths, _ = export_lines(recipe, "together", tmp_path / "out")
    lines = [json.loads(line) for line in paths["train"].read_text().splitlines()]
    plan = plan_hosted(recipe)
    assert lines == list(plan.lines["train"])
    system, user, assistant = lines[0]["messages"]
    example = plan.examples["train"][0]
    assert system["content"].endswith("a, b.")
    assert user["content"] == example.prompt
    assert assistant["content"] == plan.task.labels[example.gold or 0]
    body = plan.examples and plan.lines["dev"]
    assert len(body) == len(paths["dev"].read_text().splitlines()) == 3
    assert plan.estimate.trained_tokens > 0
    assert plan.estimate.cost is not None and 0 < plan.estimate.cost < 0.1


def test_tool_calls_are_sent_as_text_and_weights_stay(tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
        {"role": "assistant", "content": "two"},
    ]
    file = tmp_path / "c.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": [*messages, {"role": "user", "content": str(i)}, messages[-1]]}) + "\n"
            for i in range(20)
        )
    )
    recipe = make_recipe({"model": "openai:gpt-4.1-mini", "task": "chat", "data": {"train": str(file)}})
    paths, _ = export_lines(recipe, "openai", tmp_path / "out")
    sent = json.loads(paths["train"].read_text().splitlines()[0])["messages"]
    assert sent[:2] == messages[:2]
    assert json.loads(sent[3]["tool_calls"][0]["function"]["arguments"]) == {"x": 1}
    assert isinstance(sent[3]["tool_calls"][0]["function"]["arguments"], str)


def test_the_command_refuses_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "data",
        "export",
        "--task",
        "classification",
        "--train",
        rows(tmp_path, 12),
        "--folder",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--to", "openai"])
    assert caught.value.code == 2
    assert "at least 10 examples" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit) as caught:
        main([*words, "--to", "fireworks", "--json"])
    assert caught.value.code == 0
    assert Path(json.loads(capsys.readouterr().out)["paths"]["train"]).is_file()
    with pytest.raises(DataError):
        export_lines(make_recipe({"task": "chat", "data": {"train": rows(tmp_path)}}), "openai", tmp_path / "p")


def test_the_check_alone_and_nothing_sent(tmp_path: Path) -> None:
    given = {"model": "openai:gpt-4.1-mini", "task": "classification", "data": {"train": rows(tmp_path)}}
    found = check_data(given | {"train": {"method": "hosted"}})
    assert found.counts["train"]["rows"] == 21
    assert not found.refused


def test_a_dry_run_says_what_it_would_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--method", "hosted", "--model", "openai:gpt-4.1-mini", "--task", "classification", "--dry-run"]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--train", rows(tmp_path), "--json"])
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    assert json.loads(out)["estimate"]["cost"] > 0
    assert "by the prices of 2026-06-21" in err
