"""A fine-tuning service of one's own, which the official openai client drives unchanged. Needs the extra `server`."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tunefork.errors import MissingExtraError, RecipeError

try:
    import uvicorn

    from tunefork.server.app import create_app
    from tunefork.server.auth import SCOPES, create_key, list_keys, revoke_key
    from tunefork.server.jobs.keep import recover as _recover
    from tunefork.server.jobs.keep import set_aside
    from tunefork.server.settings import Catalogue, Settings, load_catalogue
    from tunefork.server.store import Store
except ImportError as error:
    raise MissingExtraError(error.name or "fastapi", "server", "`tunefork serve`") from None

from tunefork.files import FolderLock, make_folder
from tunefork.models import inspect_model

__all__ = [
    "SCOPES",
    "Catalogue",
    "Settings",
    "Store",
    "create_app",
    "create_key",
    "list_keys",
    "load_catalogue",
    "open_store",
    "revoke_key",
    "serve",
]

_log = logging.getLogger("tunefork.server")


def open_store(data: Path, database: str | None = None) -> Store:
    """The store of a data folder, for the commands that manage keys; a server may be running on it."""
    make_folder(data)
    return Store(Settings(data=data.resolve(), database=database))


def serve(
    *,
    data: Path = Path("tunefork-data"),
    database: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    models: Path | None = None,
    slots: int = 1,
    recover: bool = False,
) -> None:
    """Serves until Ctrl-C or SIGTERM; running jobs then keep their last step and go on at the next start.

    `database` is the URL of a PostgreSQL in place of a sqlite file in `data`: several servers may share both. `models`
    is models.yaml; without it the embedded model is offered. Raises MissingFileError for a model that is not there,
    RecipeError for an address beyond this machine while there is no key, RunError for a damaged database or a data
    folder that another server uses.
    """
    catalogue = load_catalogue(models) if models is not None else Catalogue()
    for section in catalogue.models.values():
        inspect_model(section)  # one that is not there is refused here, not at its first request
    with ExitStack() as undo:
        undo.callback(os.umask, os.umask(0o077))  # what clients send is nobody else's business on this machine
        make_folder(data)
        data = data.resolve()
        settings = Settings(data=data, database=database, host=host, port=port, slots=slots, catalogue=catalogue)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        if database is None:
            undo.callback(FolderLock(data).release)
        make_folder(data / "tmp")
        undo.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = str(data / "tmp")  # where bodies are spooled: the disk that has the room, not memory
        if recover:
            aside = set_aside(settings) if database is None else None
            store = Store(settings)
            found = _recover(settings, store)
            _log.warning("rebuilt %(files)d files and %(jobs)d jobs from their folders; make new API keys", found)
            if aside:
                _log.warning("the former database is %s", aside)
        else:
            store = Store(settings)
        if not settings.loopback and not any(key.revoked_at is None for key in list_keys(store)):
            raise RecipeError(
                f"A server that others can reach must have an API key. Received --host {host} and no key. "
                "Try `tunefork keys create --data DIR --project NAME` first, or --host 127.0.0.1."
            )
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what follows here is done
        _log.info("serving %s from %s on %s port %d", ", ".join(settings.catalogue.models), data, host, port)
        app = create_app(settings, store)  # its own log has no queries; uvicorn's would
        uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
        store.close()
