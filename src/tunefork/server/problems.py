"""Errors as OpenAI says them: every one is `{"error": {"message", "type", "param", "code"}}` with a request id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi.encoders import jsonable_encoder
from fastapi.responses import Response

INVALID = "invalid_request_error"


class ApiError(Exception):
    """A refusal. `status` decides the class that the openai client raises; it retries 408, 409, 429 and 5xx."""

    def __init__(
        self, message: str, *, status: int = 400, type: str = INVALID, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.type, self.param, self.code = message, status, type, param, code

    def response(self) -> Response:
        body = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        content = json.dumps({"error": body})  # ASCII: a message may quote half a character of the request
        return Response(content, self.status, media_type="application/json")


def not_found(kind: str, id: str, param: str = "id") -> ApiError:
    return ApiError(f"No such {kind} object: {shown(id)}", status=404, param=param)


def model_not_found(name: str) -> ApiError:
    message = f"The model `{shown(name)}` does not exist or you do not have access to it."
    return ApiError(message, status=404, param="model", code="model_not_found")


def shown(value: object) -> str:
    """A value of a request as part of a message: short, and of one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:99] + "…"


def from_http(status: int, method: str, path: str, detail: Any) -> ApiError:
    """What the framework refuses by itself: unknown paths and methods, bodies that cannot be read."""
    if status == 404:
        return ApiError(f"Invalid URL ({method} {shown(path)})", status=404)
    if status == 405:
        message = f"Not allowed to {method} on {shown(path)}. (HINT: Perhaps you meant to use a different HTTP method?)"
        return ApiError(message, status=405, code="method_not_supported")
    return ApiError(shown(detail), status=status, type=INVALID if status < 500 else "server_error")


_BOUNDS = {  # pydantic's name of a complaint -> (code, words around the limit)
    "greater_than": ("below_min_value", "below minimum value. Expected a value > {gt}"),
    "greater_than_equal": ("below_min_value", "below minimum value. Expected a value >= {ge}"),
    "less_than": ("above_max_value", "above maximum value. Expected a value < {lt}"),
    "less_than_equal": ("above_max_value", "above maximum value. Expected a value <= {le}"),
}
_LENGTHS = {
    "string_too_short": (
        "string_below_min_length",
        "string too short. Expected a string with minimum length {min_length}",
    ),
    "string_too_long": (
        "string_above_max_length",
        "string too long. Expected a string with maximum length {max_length}",
    ),
    "too_short": ("array_below_min_length", "too short. Expected at least {min_length} items"),
    "too_long": ("array_above_max_length", "too long. Expected at most {max_length} items"),
}


def from_validation(errors: list[dict[str, Any]]) -> ApiError:
    """The first complaint about a body or query, in OpenAI's words."""
    error = _most_telling(errors)
    kind, received = error["type"], error.get("input")
    param = _param(error["loc"]) or None
    context: Mapping[str, Any] = error.get("ctx") or {}
    if kind == "json_invalid":
        return ApiError("We could not parse the JSON body of your request. (HINT: it must be one JSON object.)")
    if kind == "missing":
        if param is None:
            return ApiError("The request must have a JSON body. Received none.", code="missing_required_parameter")
        message = f"Missing required parameter: '{param}'."
        return ApiError(message, param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return ApiError(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if kind in _BOUNDS and isinstance(received, int | float):
        number = "integer" if isinstance(received, int) else "decimal"
        code, words = _BOUNDS[kind]
        message = f"Invalid '{param}': {number} {words.format(**context)}, but got {shown(received)} instead."
        return ApiError(message, param=param, code=f"{number}_{code}")
    if kind in _LENGTHS and received is not None:
        code, words = _LENGTHS[kind]
        size = len(received) if isinstance(received, str | list | dict) else "another"
        message = f"Invalid '{param}': {words.format(**context)}, but got length {size} instead."
        return ApiError(message, param=param, code=code)
    if kind in ("literal_error", "enum"):
        message = f"Invalid value: '{shown(received)}'. Supported values are: {context['expected']}."
        return ApiError(message, param=param, code="invalid_value")
    if kind == "value_error":
        return ApiError(f"Invalid '{param}': {context.get('error', error['msg'])}", param=param, code="invalid_value")
    wanted = str(error["msg"]).removeprefix("Input should be ").rstrip(".")
    place = f"'{param}'" if param else "the body"
    message = f"Invalid type for {place}: expected {wanted}, but got {_json_type(received)} instead."
    return ApiError(message, param=param, code="invalid_type")


def _most_telling(errors: list[dict[str, Any]]) -> dict[str, Any]:
    """Of "must be 'auto'" and "must be below 50" about one value, the second."""
    first = errors[0]
    same = [e for e in errors if _param(e["loc"]) == _param(first["loc"])]
    return next((e for e in same if e["type"] in _BOUNDS or e["type"] in _LENGTHS), first)


def _param(location: tuple[Any, ...]) -> str:
    """`("body", "method", "supervised", "hyperparameters", "n_epochs", "int")` without the names of union members."""
    kinds, members = ("int", "float", "str"), ("constrained-", "literal[", "function-", "dict[", "list[")
    parts = [p for p in location[1:] if not (isinstance(p, str) and (p in kinds or p.startswith(members)))]
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).lstrip(".")


def _json_type(value: Any) -> str:
    value = jsonable_encoder(value)
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "an array", dict: "an object", int: "an integer"}
    return names.get(type(value), "a decimal")
