"""A training file, line by line, before anything is run; with OpenAI's words where they are known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIN_EXAMPLES = 10
_LONGEST_LINE = 64 * 2**20
_SHOWN = 10
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_FORMATS = {"chat": "fine-tune-chat", "completion": "fine-tune-completion", "preference": "fine-tune-preference"}
_METHODS = {"chat": "supervised", "completion": "supervised", "preference": "dpo"}


class _WrongLineError(ValueError):
    """Why one line is refused."""


@dataclass
class Report:
    """What a file holds. `problems` are the first lines that are refused, and why; `wrong` is how many there are."""

    role: str  # training or validation
    examples: int = 0
    layout: str | None = None
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def error(self, file_id: str, method: str, least: int) -> dict[str, Any] | None:
        """The job's `error` object, or None for a file that can be used."""
        param, code = f"{self.role}_file", f"invalid_{self.role}_file"
        start = f"The job failed due to an invalid {self.role} file. "
        if self.problems:
            more = f" ({self.wrong - 1} more lines are invalid.)" if self.wrong > 1 else ""
            return {"code": code, "param": param, "message": f"{start}{self.problems[0]}{more}"}
        if self.examples < least:
            message = (
                f"{self.role.title()} file has {self.examples} example(s), but must have at least {least} examples"
            )
            return {"code": "invalid_n_examples", "param": param, "message": message}
        if self.layout is not None and _METHODS[self.layout] != method:
            message = (
                f"{start}Input file {file_id} is in the {_FORMATS[self.layout]} format, but the specified fine-tuning "
                f"job is not using '{_METHODS[self.layout]}' as the training method (provided method={method})"
            )
            return {"code": code, "param": param, "message": message}
        return None


def check_file(path: Path, role: str) -> Report:
    """Reads every line; blank ones are skipped. Never raises for what stands in the file."""
    report, number = Report(role), 0
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if not line.strip():
                continue
            report.examples += 1
            try:
                if len(line) > _LONGEST_LINE:
                    raise _WrongLineError(f"Line {number} is longer than {_LONGEST_LINE} bytes.")
                layout = _check_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, report, number)
                if report.layout not in (None, layout):
                    raise _WrongLineError(f"Line {number} is of the format {layout}, lines before it {report.layout}.")
                report.layout = layout
            except _WrongLineError as wrong:
                report.wrong += 1
                if len(report.problems) < _SHOWN:
                    report.problems.append(str(wrong))
                if len(line) > _LONGEST_LINE:
                    break
    return report


def _check_line(line: bytes, report: Report, number: int) -> str:
    """The layout of a line. Raises _WrongLineError."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _WrongLineError(f"Invalid file format. Line {number} is not UTF-8 text ({error.reason}).") from None
    except (ValueError, RecursionError):
        raise _WrongLineError(
            "Expected file to have JSONL format, where every line is a valid JSON dictionary. "
            f"Line {number} is not valid JSON."
        ) from None
    if not isinstance(row, dict):
        raise _WrongLineError(
            "Expected file to have JSONL format, where every line is a valid JSON dictionary. "
            f"Line {number} is not a dictionary."
        )
    where = f"Invalid file format. Example {report.examples}"
    if "messages" in row:
        _check_messages(row["messages"], where, row.get("tools"))
        _require_assistant(row["messages"], where)
        return "chat"
    if "preferred_output" in row or "non_preferred_output" in row:
        _check_preference(row, where)
        return "preference"
    if "prompt" in row and "completion" in row:
        for name in ("prompt", "completion"):
            if not isinstance(row[name], str) or (name == "completion" and not row[name].strip()):
                raise _WrongLineError(f"{where}, {name} must be a string that is not empty.")
        return "completion"
    raise _WrongLineError("Unexpected file format, expected either prompt/completion pairs or chat messages.")


def _check_preference(row: Mapping[str, Any], where: str) -> None:
    given = row.get("input")
    if not isinstance(given, Mapping) or "messages" not in given:
        raise _WrongLineError(f"{where}, input must be an object with messages.")
    _check_messages(given["messages"], f"{where}, input", given.get("tools"))
    for name in ("preferred_output", "non_preferred_output"):
        output = row.get(name) or []
        _check_messages(output, f"{where}, {name}", None)
        if len(output) != 1 or output[0]["role"] != "assistant" or not output[0].get("content"):
            raise _WrongLineError(f"{where}, {name} must be one message of the assistant, of text.")


def _check_messages(messages: Any, where: str, tools: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise _WrongLineError(f"{where}, messages must be a list that is not empty.")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise _WrongLineError(f"{where}, tools must be a list of objects.")
    for place, message in enumerate(messages, 1):
        _check_message(message, f"{where}, message {place}")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise _WrongLineError(f"{where} Input should be a valid dictionary")
    if "role" not in message:
        raise _WrongLineError(f"{where} Discriminator 'role' is missing in value")
    role = message["role"]
    if role not in _ROLES:
        expected = ", ".join(f"'{name}'" for name in _ROLES)
        raise _WrongLineError(
            f"{where} Input tag '{str(role)[:40]}' found using 'role' does not match any of the expected tags: "
            f"{expected}"
        )
    weight = message.get("weight")
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise _WrongLineError(f"{where} weight must be 0 or 1, and stand in a message of the assistant")
    calls = message.get("tool_calls") or message.get("function_call")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    text = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if isinstance(content, list):
        if not parts or not all(isinstance(t, str) for t in text) or len(text) != len(parts):
            raise _WrongLineError(f"{where} content must be text, or a list of text parts")
    elif not isinstance(content, str) and not (content is None and calls and role == "assistant"):
        raise _WrongLineError(f"{where} content must be text")
    written = content if isinstance(content, str) else "".join(str(t) for t in text)
    empty = not written.strip()
    if empty and not calls and (role == "user" or (role == "assistant" and weight != 0)):
        raise _WrongLineError(f"{where} content must not be empty")


def _require_assistant(messages: list[Mapping[str, Any]], where: str) -> None:
    if messages[-1]["role"] != "assistant":
        raise _WrongLineError(f"{where}, the last message must be from the assistant")
    if all(m.get("weight", 1) == 0 for m in messages if m["role"] == "assistant"):
        raise _WrongLineError(f"{where}, at least one message from the assistant must have a weight that is not 0")
