"""A rendered example, and the arithmetic of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunefork.tasks.base import Example


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as token ids. `ids` ends where the candidates, if there are any, begin."""

    example: Example
    ids: tuple[int, ...]
    trained: tuple[bool, ...]  # one per id: the loss is on predicting it
    candidates: tuple[tuple[int, ...], ...] = ()
    read_at: int | None = None  # position whose logits choose among candidates of one token each
    cut: int = 0  # tokens left out to fit max_length
    cut_side: str = ""  # "left", "right", or "turns" where the oldest turns of a chat are left out
    answer_cut: bool = False  # the answer itself did not fit: nothing is trained

    @property
    def fanned_out(self) -> bool:
        """Whether each candidate is a sequence of its own."""
        return bool(self.candidates) and self.read_at is None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence this becomes."""
        return len(self.ids) + (max(len(c) for c in self.candidates) if self.fanned_out else 0)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence before anything was cut."""
        return self.longest + self.cut


def common_prefix(prompt: Sequence[int], wholes: Sequence[Sequence[int]]) -> int:
    """Length of what all id sequences begin with; each of `wholes` keeps at least one id after it."""
    limit = min(len(prompt), *(len(whole) - 1 for whole in wholes))
    for i in range(limit):
        if any(whole[i] != prompt[i] for whole in wholes):
            return i
    return max(0, limit)


def leading(ids: Sequence[int], start: Sequence[int]) -> int:
    """How many start tokens stand at the beginning: all of them or none."""
    return len(start) if tuple(ids[: len(start)]) == tuple(start) else 0


def last_words(text: str) -> int:
    """Where the last line, or else the last two words of a text begin: a place that no token should reach across."""
    line = text.rfind("\n") + 1
    if 0 < line < len(text) - 3 and text[line].isalpha():
        return line
    at, words = len(text), 0
    while words < 2 and at > 0:
        at = max(0, text.rfind(" ", 0, at))
        words += text[at - 1 : at].strip() != "" and text[at + 1 : at + 2].strip() != ""
    return at


def trained_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens overlap a span of characters [begin, end).

    Byte-level tokenizers trim spaces off a token's offsets, to nothing for a token of spaces only (an indentation):
    a token is taken to begin where the one before it ended.
    """
    found: list[bool] = []
    reached = 0
    for begin, end in offsets:
        begin = min(begin, reached)
        found.append(any(begin < b and a < end for a, b in spans))
        reached = max(reached, end)
    return found
