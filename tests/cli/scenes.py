"""The command line as a person uses it, and files such as people have."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tunefork.cli import main

ROWS = 24
_THINGS = ("soup", "waiter", "room", "bed", "coffee", "pizza", "garden", "music")
_WORDS = {"good": ("lovely", "fresh", "friendly"), "bad": ("cold", "rude", "broken")}


class Said(NamedTuple):
    """What a command left behind: exit code, stdout, and stderr."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """stderr as one line, without the frame that wrong flags are shown in."""
        return " ".join(re.sub("[│╭╮╰╯─]", " ", self.err).split())


Command = Callable[..., Said]


def said_by(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> Said:
    """Calls the command line's entry in this process."""
    capsys.readouterr()
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    said = capsys.readouterr()
    return Said(code, said.out, said.err)


def reviews(rows: int = ROWS, labels: Sequence[str] = ("good", "bad")) -> list[dict[str, str]]:
    """Different texts, labels in turn."""
    found: list[dict[str, str]] = []
    for i in range(rows):
        word = _WORDS["good" if i % len(labels) == 0 else "bad"][i // 2 % 3]
        found.append({"text": f"The {_THINGS[i % 8]} was {word}, visit {i}.", "label": labels[i % len(labels)]})
    return found


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json_lines(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chats(rows: int = ROWS, **reply: Any) -> list[dict[str, Any]]:
    """Conversations in OpenAI's shape; `reply` is added to the assistant's message."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Is room {i} free?"},
                {"role": "assistant", "content": f"Yes, room {i} is free.", **reply},
            ]
        }
        for i in range(rows)
    ]


def put(path: Path, content: str | bytes | Sequence[Mapping[str, Any]]) -> Path:
    """A file with this content; rows are written as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(as_json_lines(content) if path.suffix == ".jsonl" else as_csv(content), encoding="utf-8")
    return path
