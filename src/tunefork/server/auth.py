"""Who is asking, and what they may do. A key opens one project; without any key, only this machine is served."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.security import SecurityScopes
from sqlalchemy import select
from starlette.datastructures import Headers

from tunefork.errors import RecipeError
from tunefork.server.problems import ApiError
from tunefork.server.settings import is_loopback
from tunefork.server.store import Key, Store, new_id, now

PREFIX = "sk-tf-"
DEFAULT_PROJECT = "proj_default"
SCOPES = (
    "api.files.read",
    "api.files.write",
    "api.fine_tuning.jobs.read",
    "api.fine_tuning.jobs.write",
    "api.fine_tuning.checkpoints.read",
    "api.fine_tuning.checkpoints.write",
    "api.model.read",
    "api.model.delete",
    "model.request",
)
"""OpenAI's names, as far as they are known. Those of checkpoints share models with other projects."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A project, asked for by one of its keys. `key_id` is "anonymous" where no key is needed."""

    project_id: str
    key_id: str
    scopes: frozenset[str]


ANONYMOUS = Caller(DEFAULT_PROJECT, "anonymous", frozenset(SCOPES))


def create_key(store: Store, *, project: str, name: str = "", scopes: Sequence[str] = SCOPES) -> tuple[str, Key]:
    """A new key (shown this once; the store has its hash) and its row. Raises RecipeError for an unknown scope."""
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise RecipeError(f"A key's scopes must be of {', '.join(SCOPES)}. Received {', '.join(unknown)}.")
    secret = PREFIX + secrets.token_urlsafe(32)
    row = Key(id=new_id("key_", 16), hash=_hash(secret), project_id=project, name=name, scopes=list(scopes))
    with store.write() as db:
        db.add(row)
    return secret, row


def list_keys(store: Store) -> list[Key]:
    with store.read() as db:
        return list(db.scalars(select(Key).order_by(Key.seq)))


def revoke_key(store: Store, id: str) -> None:
    """From now on the key opens nothing. Raises RecipeError for one that is not there."""
    with store.write() as db:
        row = db.scalar(select(Key).where(Key.id == id))
        if row is None:
            raise RecipeError(f"A key to revoke must be there. Received {id!r}. Try `tunefork keys list`.")
        row.revoked_at = row.revoked_at or now()


def identify(store: Store, headers: Headers, *, loopback: bool) -> Caller:
    """The caller behind a request's headers. Raises ApiError (401, or 403 for a page of another site)."""
    with store.read() as db:
        keyless = loopback and db.scalar(select(Key.seq).limit(1)) is None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
        key = None if keyless or not secret else db.scalar(select(Key).where(Key.hash == _hash(secret)))
    if keyless:
        _refuse_other_sites(headers)
        return ANONYMOUS
    if not secret:
        raise ApiError(
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
            "auth (i.e. Authorization: Bearer YOUR_KEY).",
            status=401,
        )
    if key is None or key.revoked_at is not None:
        raise ApiError(f"Incorrect API key provided: {_masked(secret)}.", status=401, code="invalid_api_key")
    project = headers.get("openai-project")
    if project not in (None, "", key.project_id):
        message = "OpenAI-Project header should match project for API key."
        raise ApiError(message, status=401, code="mismatched_project")
    return Caller(key.project_id, key.id, frozenset(key.scopes))


def _refuse_other_sites(headers: Headers) -> None:
    """Without keys, a web page must not reach the server through a browser on this machine."""
    for name in ("host", "origin"):
        value = headers.get(name)
        host = urlsplit(value if name == "origin" else f"//{value}").hostname if value else "localhost"
        if not is_loopback(host or ""):
            message = f"Without API keys only this machine is served. Received the {name} header of another."
            raise ApiError(message, status=403, code="forbidden")


def _hash(secret: str) -> str:
    """SHA-256 is enough: a key has 256 random bits, so there is nothing to guess."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def _masked(secret: str) -> str:
    return f"{secret[:3]}{'*' * 8}{secret[-4:]}" if len(secret) >= 16 else "*" * 8


def allowed(request: Request, wanted: SecurityScopes) -> Caller:
    """The caller, who must have the scopes of `Annotated[Caller, Security(allowed, scopes=[…])]`. Raises ApiError."""
    caller: Caller = request.state.caller
    if missing := [scope for scope in wanted.scopes if scope not in caller.scopes]:
        raise ApiError(
            f"You have insufficient permissions for this operation. Missing scopes: {', '.join(missing)}.",
            status=403,
            code="missing_scope",
        )
    return caller
