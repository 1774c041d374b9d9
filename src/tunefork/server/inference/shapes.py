"""What messages and tools must look like, and the types of what is accepted and changes nothing here.

Messages and tools go on as they came, to the path that training rows take; these classes only refuse what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunefork.server.problems import from_validation


class Shape(BaseModel):
    """Keys that are not named here are let pass, as the specification does."""

    model_config = ConfigDict(extra="ignore", strict=True)


Content = str | Annotated[list[dict[str, Any]], Field(min_length=1)]


class Said(Shape):
    """A message of the system, a developer or a user."""

    content: Content
    name: str = ""


class Called(Shape):
    name: str
    arguments: str


class Call(Shape):
    id: str
    type: Literal["function"]
    function: Called


class Recording(Shape):
    id: str


class Answered(Shape):
    """A message of the assistant."""

    content: Content | None = None
    name: str = ""
    refusal: str | None = None
    audio: Recording | None = None
    tool_calls: list[Call] | None = None
    function_call: Called | None = None


class FromTool(Shape):
    content: Content
    tool_call_id: str


class FromFunction(Shape):
    content: str | None
    name: str


class Spoken(Shape):
    """Any message: what decides which of the others it must be."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]


_ROLES: Mapping[str, type[Shape]] = {"assistant": Answered, "tool": FromTool, "function": FromFunction}


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Raises ApiError for the first that is not as the specification has it."""
    check_list("messages", messages, lambda message: _ROLES.get(Spoken.model_validate(message).role, Said))


def check_list(name: str, items: Sequence[Mapping[str, Any]], shape: Callable[[Any], type[Shape]]) -> None:
    """Raises ApiError, with its place, for the first item that does not have its shape."""
    for place, item in enumerate(items):
        try:
            shape(item).model_validate(item)
        except ValidationError as error:
            wrong = [{**e, "loc": ("body", name, place, *e["loc"])} for e in error.errors()]
            raise from_validation(wrong) from None


class Function(Shape):
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool | None = None


class Tool(Shape):
    type: Literal["function"]
    function: Function


class Voice(Shape):
    id: str


class Audio(Shape):
    voice: str | Voice
    format: Literal["wav", "aac", "mp3", "flac", "opus", "pcm16"]


class Moderation(Shape):
    model: str
    policy: dict[str, Any] | None = None


class Prediction(Shape):
    type: Literal["content"]
    content: Content


class Place(Shape):
    city: str = ""
    country: str = ""
    region: str = ""
    timezone: str = ""


class UserLocation(Shape):
    type: Literal["approximate"]
    approximate: Place


class WebSearch(Shape):
    search_context_size: Literal["low", "medium", "high"] = "medium"
    user_location: UserLocation | None = None
