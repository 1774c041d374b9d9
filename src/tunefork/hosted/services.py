"""Which service, which model, which key: `openai:gpt-4.1-mini`, `azure:DEPLOYMENT`, `nebius:NAME`, `URL#MODEL`."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import yaml

from tunefork.errors import RecipeError, UnsupportedError

ANY_KEY = "TUNEFORK_API_KEY"  # of a service that is given as a URL: another one's key must not go there
_URL = re.compile(r"https?://")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Service:
    """Where requests go, and where the key is looked for."""

    name: str  # openai, azure, nebius, or the host of a URL
    base_url: str
    key_variable: str
    longest: str = "max_tokens"  # the field that bounds an answer
    flat: bool = False  # a job's hyperparameters stand beside its model, without `method`
    mark: bool = False  # its files begin with a byte-order mark
    rules: str = "openai"  # of formats.yaml, for its training files

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine, where nothing is paid for and a key may not be needed."""
        return urlsplit(self.base_url).hostname in _LOOPBACK


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A model of a service. `name` is what a recipe calls it, `id` what the service calls it."""

    name: str
    service: Service
    id: str

    @property
    def base(self) -> str:
        """What it was tuned from, by its name (`ft:BASE:org:suffix:id`, `BASE.ft-id`); itself for one that was not."""
        parts = self.id.split(":")
        return parts[1] if parts[0] == "ft" and len(parts) > 2 else self.id.partition(".ft-")[0]

    @property
    def is_tuned(self) -> bool:
        return self.base != self.id

    def sibling(self, id: str) -> HostedModel:
        """Another model of the same service."""
        return HostedModel(self.name.removesuffix(self.id) + id, self.service, id)


def is_hosted(name: str) -> bool:
    """Whether a model's name is that of a service's model rather than of a folder or of the hub."""
    return name.partition(":")[0] in _known() or _URL.match(name) is not None


def find_model(name: str) -> HostedModel:
    """The model a name stands for. Raises RecipeError for a name without a model, or a service without its address."""
    url = _URL.match(name) is not None
    start, _, id = name.partition("#" if url else ":")
    if not id or not (url or start in _known()):
        raise RecipeError(
            f"A hosted model must be {', '.join(f'{s}:MODEL' for s in _known())}, or URL#MODEL. Received {name!r}. "
            "Try openai:gpt-4.1-mini, or http://127.0.0.1:8000/v1#fork-tiny."
        )
    return HostedModel(name, find_service(start), id)


def find_service(name: str) -> Service:
    """A service by its name or its URL."""
    if _URL.match(name):
        parts = urlsplit(name)
        if "@" in parts.netloc or parts.query:  # they would be written into every recipe and report
            raise RecipeError(
                f"A service's address must not hold a password or a query. Received one. Try {ANY_KEY} for the key."
            )
        return Service(parts.hostname or name, name.rstrip("/"), ANY_KEY)
    if name not in _known():
        raise RecipeError(f"A service must be {', '.join(_known())}, or a URL. Received {name!r}. Try openai.")
    entry = _known()[name]
    variable = re.search(r"{(\w+)}", entry["base_url"])
    base_url = entry["base_url"]
    if variable is not None:
        address = os.environ.get(variable[1], "").rstrip("/").removesuffix("/openai/v1")
        if not address:
            raise RecipeError(
                f"`{name}:` needs the address of your resource in {variable[1]}. Received none. "
                f"Try export {variable[1]}=https://NAME.openai.azure.com."
            )
        base_url = base_url.replace(variable[0], address)
    return Service(name, base_url, **{k: v for k, v in entry.items() if k != "base_url"})


def find_key(service: Service) -> str:
    """The key from the environment, else from the system's keyring (service `tunefork`, user `service.name`).

    Raises RecipeError when there is none, or when what was found cannot be a key; what it is, is never shown.
    """
    key = os.environ.get(service.key_variable) or _from_keyring(service.name)
    if key is None:
        if service.is_local:
            return "none"
        raise RecipeError(
            f"{service.name} needs a key. Received none. Try export {service.key_variable}=…, or "
            f"`keyring set tunefork {service.name}` once."
        )
    key = key.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise RecipeError(
            f"The key of {service.name} must be one word of plain letters. Received {len(key)} characters with others "
            f"among them. Try copying it again into {service.key_variable}."
        )
    return key


def _from_keyring(user: str) -> str | None:
    try:
        import keyring
        import keyring.errors
    except ImportError:
        return None
    try:
        return keyring.get_password("tunefork", user)
    except keyring.errors.NoKeyringError:
        return None
    except keyring.errors.KeyringError as error:
        raise UnsupportedError(
            f"The keyring must open. Received: {type(error).__name__}. Try the key in the environment instead."
        ) from None


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((files("tunefork.hosted") / "services.yaml").read_text(encoding="utf-8"))
