"""Which characters of a rendered chat are learned: the difference between renderings of growing prefixes.

A template needs no generation marks for this. One that rewrites earlier turns is rendered once a reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from tunefork.errors import DataError
from tunefork.tasks.base import Example, Message


@dataclass(frozen=True, slots=True)
class ChatText:
    """A conversation as the template writes it, and the spans [begin, end) of characters that are trained."""

    text: str
    trained: tuple[tuple[int, int], ...]


def prompt_text(tokenizer: Any, example: Example) -> str:
    """The conversation so far with the opening of the next reply."""
    return _apply(tokenizer, example, len(example.messages), opening=True)


def chat_texts(tokenizer: Any, example: Example) -> list[ChatText]:
    """One text with all its trained replies; or one a trained reply, where the template rewrites earlier turns.

    A reply's span runs from the end of the rendering before it, with the reply opened, to the end of the rendering
    with it, so it holds the reply and its stop token. Raises DataError where not even one reply alone is a
    continuation of its own prompt.
    """
    replies = [i for i, m in enumerate(example.messages) if m.role == "assistant" and m.trained]
    whole = _apply(tokenizer, example, len(example.messages), opening=False)
    spans: list[tuple[int, int]] = []
    texts: list[ChatText] = []
    for i in replies:
        before = _apply(tokenizer, example, i, opening=True)
        after = _apply(tokenizer, example, i + 1, opening=False)
        if not after.startswith(before):
            raise DataError(
                f"{example.source}: a reply must continue what the chat template writes before it. The template of "
                f"this model rewrites the conversation at message {i + 1}. Try another template."
            )
        end = len(after) if i + 1 == len(example.messages) else len(after.rstrip())
        texts.append(ChatText(after, ((len(before), len(after)),)))
        spans.append((len(before), end))
    consistent = all(
        whole[: span[1]] == text.text[: span[1]] for text, span in zip(texts, spans, strict=True)
    )
    if consistent:
        return [ChatText(whole, tuple(spans))]
    return texts


def _apply(tokenizer: Any, example: Example, turns: int, *, opening: bool) -> str:
    messages = [_as_dict(m) for m in example.messages[:turns]]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=[dict(t) for t in example.tools] or None,
                add_generation_prompt=opening,
                tokenize=False,
            )
        )
    except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"{example.source}: the model's chat template must accept the conversation. It says: {error}. "
            "Try `tunefork data show` on a row that works, or mend the roles of this one."
        ) from None


def _as_dict(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content, **(message.extra or {})}
