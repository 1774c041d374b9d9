"""Which characters of a rendered chat are learned: the difference between renderings of growing prefixes.

A template needs no generation marks for this. One that rewrites earlier turns is rendered once a reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from tunefork.errors import DataError, RecipeError
from tunefork.tasks.base import Example, Message


@dataclass(frozen=True, slots=True)
class ChatText:
    """A conversation as the template writes it, and the spans [begin, end) of characters that are trained."""

    text: str
    trained: tuple[tuple[int, int], ...]
    turns: int  # messages of the conversation that the text holds


def prompt_text(tokenizer: Any, example: Example) -> str:
    """The conversation so far with the opening of the next reply."""
    return _apply(tokenizer, example, len(example.messages), opening=True)


def chat_texts(tokenizer: Any, example: Example) -> list[ChatText]:
    """One text with all its trained replies; or one a trained reply, where the template rewrites earlier turns.

    A reply's span runs from the end of the rendering before it, with the reply opened, to the end of the rendering
    with it: the reply and its stop token. White space that only separates it from the next turn is not part of it.
    Raises DataError where not even one reply alone is a continuation of its own prompt.
    """
    count = len(example.messages)
    whole = _apply(tokenizer, example, count, opening=False)
    texts: list[ChatText] = []
    for i, message in enumerate(example.messages):
        if message.role != "assistant" or not message.trained:
            continue
        before = _apply(tokenizer, example, i, opening=True)
        after = _apply(tokenizer, example, i + 1, opening=False) if i + 1 < count else whole
        if not after.startswith(before):
            raise DataError(
                f"{example.source}: a reply must continue what the chat template writes before it. The template of "
                f"this model rewrites the conversation at message {i + 1}. Try another template, or a base model "
                "with --task generation."
            )
        texts.append(ChatText(after, ((len(before), _end(before, after, message)),), i + 1))
    spans = tuple(text.trained[0] for text in texts)
    if all(whole[:end] == text.text[:end] for text, (_, end) in zip(texts, spans, strict=True)):
        return [ChatText(whole, spans, count)]
    return texts


def shorter_chats(example: Example, turns: int | None = None) -> list[Example]:
    """The conversation without its oldest exchange, without its oldest two, and so on.

    System messages stay, each conversation begins with a user's message, and the last exchange is never left out.
    `turns` is how many messages of the example the conversation has; all when absent.
    """
    messages = example.messages[:turns]
    first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    starts = [i for i, m in enumerate(messages) if i > first and m.role == "user"]
    return [replace(example, messages=(*messages[:first], *messages[i:])) for i in starts]


def stop_text(tokenizer: Any) -> str:
    """What the template writes after a reply, without surrounding white space: its stop token. Empty if nothing.

    Raises RecipeError where the template does not even accept a question and its answer.
    """
    probe = Example("the chat template", messages=(Message("user", "a"), Message("assistant", "zyx")))
    try:
        text = _apply(tokenizer, probe, 2, opening=False)
    except DataError as error:
        raise RecipeError(str(error)) from None
    return text.rpartition("zyx")[2].strip()


def _end(before: str, after: str, message: Message) -> int:
    """Where a reply's span ends: after its stop token, or after white space where that is all that ends it."""
    end = len(after.rstrip())
    closing = after[len(before) :].rpartition(message.content.strip())[2] if message.content.strip() else ""
    return end if closing.strip() or not closing else len(after)


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
    except (TemplateError, TypeError, LookupError, ValueError, AttributeError) as error:
        raise DataError(
            f"{example.source}: the model's chat template must accept the conversation "
            f"({_roles(example.messages[:turns])}). It says: {error}. Try changing the roles of this row, or a model "
            "with another template."
        ) from None


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(m.role for m in messages[:6]) + (" …" if len(messages) > 6 else "") or "nothing before a reply"


def _as_dict(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content, **(message.extra or {})}
