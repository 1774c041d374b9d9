"""An Example as a conversation: what a chat template writes out, and what a hosted model is sent."""

from __future__ import annotations

from tunefork.tasks.base import Example, Message


def asked_messages(example: Example) -> tuple[Message, ...]:
    """The question: a chat without the reply that is to be generated, or the prompt as a message of the user."""
    if not example.messages:
        return (Message("user", example.prompt),)
    return example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages


def taught_messages(example: Example) -> tuple[Message, ...]:
    """The question with its right answer as the reply; the question alone where none is known."""
    if example.messages and not example.candidates:
        return example.messages
    right = example.answer if example.gold is None else example.candidates[example.gold]
    return asked_messages(example) if right is None else (*asked_messages(example), Message("assistant", right.strip()))
