"""How much of the specification is served: which of its properties a request may have, and which a reply has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from pydantic import TypeAdapter

from tests.server.scenes import rows
from tests.server.seeded import JOB, MODELS, PART, UPLOAD
from tunefork.server.inference.requests import ChatAsked, TextAsked
from tunefork.server.inference.shapes import Answered, FromFunction, FromTool, Function, Said, Spoken, Tool
from tunefork.server.jobs.requests import NewJob
from tunefork.server.routes.files import NewFile
from tunefork.server.routes.permissions import Grant
from tunefork.server.routes.uploads import Completion, NewUpload

Json = dict[str, Any]
Paths = set[str]

CATEGORIES = {
    "files": ("/files",),
    "uploads": ("/uploads",),
    "fine-tuning jobs": ("/fine_tuning/jobs",),
    "checkpoint permissions": ("/fine_tuning/checkpoints",),
    "models": ("/models",),
    "chat completions": ("/chat/completions",),
    "completions": ("/completions",),
}
GRADERS = "method.reinforcement"
_KINDS = {  # what a request's body is read as
    "/files": NewFile,
    "/uploads": NewUpload,
    "/uploads/{upload_id}/complete": Completion,
    "/fine_tuning/jobs": NewJob,
    "/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions": Grant,
    "/chat/completions": ChatAsked,
    "/completions": TextAsked,
}
_FORMS = {"/files": {"file"}, "/uploads/{upload_id}/parts": {"data"}}  # bytes of a form, which no class names
_MESSAGES = Spoken | Said | Answered | FromTool | FromFunction
_NESTED = {"messages": list[_MESSAGES], "tools": list[Tool], "functions": list[Function]}  # checked apart, see shapes
_PART = {f"messages[].content[]{name}" for name in ("", ".type", ".text")}


def shares(specification: Json, url: str, key: str) -> str:
    """A table: category, properties of requests that are used, and of replies that are sent, each of how many. One that
    several operations have counts once."""
    sent = _replies(url, key)
    lines = [f"{'':24} {'requests':>18} {'only named':>12} {'replies':>18}"]
    whole, later = [0] * 5, 0
    for category, starts in CATEGORIES.items():
        asked, used, named, told, given = (set[str]() for _ in range(5))
        for path, item in specification["paths"].items():
            if not path.startswith(starts):
                continue
            for verb, operation in item.items():
                body = set(_properties(_content(operation.get("requestBody", {})), specification))
                ours, ignored = _accepted(path)
                asked |= body
                used |= body & (ours - ignored)
                named |= body & ignored
                reply = set(_properties(_content(operation["responses"]["200"]), specification))
                told |= {p.removeprefix("data[].") for p in reply}
                given |= {p.removeprefix("data[].") for p in reply & sent.get((verb, path), set())}
        counts = [sum(GRADERS not in p for p in found) for found in (used, asked, named, given, told)]
        later += sum(GRADERS in p for p in asked | told)
        whole = [a + b for a, b in zip(whole, counts, strict=True)]
        lines.append(_line(category, counts))
    return "\n".join([*lines, _line("all", whole), f"and {later} properties of graders, which are not served yet"])


def _line(name: str, counts: list[int]) -> str:
    def share(some: int, all_: int) -> str:
        return f"{some:4} of {all_:3} {some / all_:6.0%}" if all_ else f"{'-':>18}"

    used, asked, named, given, told = counts
    return f"{name:24} {share(used, asked):>18} {named:>12} {share(given, told):>18}"


def _content(part: Json) -> Json:
    """The schema of a body: of JSON, or of a form."""
    return next((kind.get("schema", {}) for kind in part.get("content", {}).values()), {})


def _properties(schema: Any, root: Json, above: tuple[str, ...] = ()) -> Iterator[str]:
    """`a`, `a.b`, `a.c[].d` …: every property that a value of the schema may have. A schema within itself is not
    followed."""
    if not isinstance(schema, Mapping):
        return
    if "$ref" in schema:
        name = schema["$ref"]
        if name not in above:
            found: Any = root
            for step in name.removeprefix("#/").split("/"):
                found = found[step]
            yield from _properties(found, root, (*above, name))
        return
    for word in ("allOf", "anyOf", "oneOf"):
        for option in schema.get(word, ()):
            yield from _properties(option, root, above)
    for inner in _properties(schema.get("items"), root, above):
        yield f"[].{inner}".replace("[].[]", "[][]")
    for name, value in schema.get("properties", {}).items():
        yield name
        for inner in _properties(value, root, above):
            yield f"{name}{'' if inner.startswith('[]') else '.'}{inner}"


def _accepted(path: str) -> tuple[Paths, Paths]:
    """Properties of a request that mean something here, and those that are accepted, and named in the reply."""
    found = set(_FORMS.get(path, ()))
    kind = _KINDS.get(path)
    if kind is None:
        return found, set()
    root = kind.model_json_schema()
    found |= set(_properties(root, root))
    if kind is not ChatAsked and kind is not TextAsked:
        return found, set()
    if kind is ChatAsked:
        for name, nested in _NESTED.items():
            inner = TypeAdapter(nested).json_schema()
            found |= {f"{name}{p}" for p in _properties(inner, inner)}
        found |= _PART
    ignored = {p for p in found if p.split(".")[0].split("[")[0] in kind.UNUSED}
    return found, ignored


def _replies(url: str, key: str) -> dict[tuple[str, str], Paths]:
    """What replies of the seeded server have in them, by operation of the specification."""
    found: dict[tuple[str, str], Paths] = {}
    jobs, permissions = "/fine_tuning/jobs", "/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions"
    job, at = f"{jobs}/{JOB}", permissions.replace("{fine_tuned_model_checkpoint}", MODELS[1])
    section = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    weights = [{"type": "wandb", "wandb": {"project": "p", "name": "n", "entity": "e", "tags": ["t"]}}]
    new = {"model": "fork-tiny", "training_file": "file-abc123", "integrations": weights}
    asked: Json = {"model": "fork-tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    expiring = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    upload = {"filename": "f", "purpose": "batch", "bytes": 1, "mime_type": "text/plain"}
    calls: list[tuple[str, str, str, Json]] = [
        ("post", "/files", "/files", {"files": {"file": ("f", rows())}, "data": expiring}),
        ("get", "/files", "/files", {}),
        ("get", "/files/{file_id}", "/files/file-abc123", {}),
        ("delete", "/files/{file_id}", "/files/file-abc123", {}),
        ("post", "/uploads", "/uploads", {"json": upload}),
        ("post", "/uploads/{upload_id}/parts", f"/uploads/{UPLOAD}/parts", {"files": {"data": b"x"}}),
        ("post", "/uploads/{upload_id}/complete", f"/uploads/{UPLOAD}/complete", {"json": {"part_ids": [PART]}}),
        ("post", "/uploads/{upload_id}/cancel", f"/uploads/{UPLOAD}/cancel", {}),
        *(("post", jobs, jobs, {"json": {**new, "method": m}}) for m in ({"type": "supervised"}, section)),
        ("get", jobs, jobs, {}),
        ("get", f"{jobs}/{{fine_tuning_job_id}}", job, {}),
        *(("post", f"{jobs}/{{fine_tuning_job_id}}/{v}", f"{job}/{v}", {}) for v in ("pause", "resume", "cancel")),
        *(("get", f"{jobs}/{{fine_tuning_job_id}}/{v}", f"{job}/{v}", {}) for v in ("events", "checkpoints")),
        ("get", permissions, at, {}),
        ("post", permissions, at, {"json": {"project_ids": ["p"]}}),
        ("delete", f"{permissions}/{{permission_id}}", f"{at}/cp_zc4Q7MP6XxulcVzj4MZdwsAB", {}),
        ("get", "/models", "/models", {}),
        *((verb, "/models/{model}", f"/models/{MODELS[0]}", {}) for verb in ("get", "delete")),
        ("post", "/chat/completions", "/chat/completions", {"json": {**asked, "logprobs": True, "top_logprobs": 2}}),
        ("post", "/completions", "/completions", {"json": {**asked, "prompt": "Hi", "logprobs": 2}}),
    ]
    calls[-1][3]["json"].pop("messages")
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        for verb, operation, path, more in calls:
            reply = client.request(verb, path, **more)
            if reply.status_code != 200 and operation.endswith("/resume"):
                continue  # the seeded job runs
            reply.raise_for_status()
            found.setdefault((verb, operation), set()).update(_keys(json.loads(reply.text)))
    return found


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from (f"[].{inner}".replace("[].[]", "[][]") for inner in _keys(item))
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from (f"{name}{'' if inner.startswith('[]') else '.'}{inner}" for inner in _keys(item))
