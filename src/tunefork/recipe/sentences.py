"""What pydantic finds wrong with a recipe, as sentences: what must hold, what was received, what to try."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from tunefork.errors import did_you_mean

_MUST: dict[str, str] = {  # pydantic's kind of error -> what must hold
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "dict_type": "must be pairs of a key and a value",
    "tuple_type": "must be a list",
}
_NO_KEYS = re.compile(r"function-.*|constrained-.*|(literal|tuple|dict)\[.*|str|bool")  # pydantic's words in a union


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, pydantic field) of every leaf of nested sections, in order."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def sentences(error: ValidationError, model: type[BaseModel]) -> str:
    """Everything that is wrong, one sentence a line."""
    known = dict(leaves(model))
    return one_a_line([_sentence(dict(e), known) for e in _telling(error)])


def one_a_line(problems: Sequence[str]) -> str:
    """The sentences, each once and with its full stop."""
    return "\n".join(p if p.endswith((".", "?", ")")) else p + "." for p in dict.fromkeys(problems))


def _telling(error: ValidationError) -> list[Any]:
    """The complaints, without "must be 'auto'" where another one about the same key says what else it may be."""
    found: list[Any] = list(error.errors())
    said = {e["loc"][:2] for e in found if e["type"] != "literal_error" or e["ctx"]["expected"] != "'auto'"}
    return [e for e in found if e["loc"][-1] != "literal['auto']" or e["loc"][:2] not in said]


def _sentence(error: dict[str, Any], known: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"] if not _NO_KEYS.fullmatch(str(part)))
    received = error.get("input")
    if error["type"] == "extra_forbidden":
        return _unknown(path, known)
    if path == "task" and error["type"] == "missing":
        kinds = "classification, choice, generation, chat, preference, scoring or a preset"
        return f"`task` must be given: {kinds}. Try --task sst2"
    if error["type"] == "missing":
        return f"`{path}` must be given"
    if error["type"] in ("model_type", "model_attributes_type"):
        return (
            f"`{path}` must be a section with keys of its own. Received {received!r}. See docs/recipe.md for its keys."
        )
    leaf = max((p for p in known if path == p or path.startswith(p + ".")), key=len, default=path)
    options = re.findall(r"'([^']+)'", error["msg"]) if error["type"] == "literal_error" else []
    hint = did_you_mean(received, options) if isinstance(received, str) else ""
    must = _MUST.get(error["type"]) or re.sub(r"^(Input|Value error,|Tuple)\s*(should)?", "must", error["msg"])
    description = known[leaf].description if leaf in known else ""
    return f"`{path}` {must.replace(' after validation', '')}. Received {received!r}.{hint}" + (
        f" ({description})" if description and not hint else ""
    )


def _unknown(path: str, known: dict[str, Any]) -> str:
    """A key that there is none of: one of its section with nearly its name, or of another with just its name."""
    parent, _, name = path.rpartition(".")
    inside = {p[len(parent) + 1 if parent else 0 :].split(".")[0] for p in known if p.startswith(parent)}
    hint = did_you_mean(name, inside, f"{parent}." if parent else "")
    elsewhere = [p for p in known if p.rpartition(".")[2] == name]
    if not hint and elsewhere:
        hint = f" Did you mean `{elsewhere[0]}`?"
    return f"`{path}` is not a key of the recipe.{hint or ' See docs/recipe.md for all keys.'}"
