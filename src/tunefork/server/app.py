"""The application: routes, errors, and what starts and ends with it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy import text
from starlette.exceptions import HTTPException

from tunefork import __version__
from tunefork.files import clean_leftovers
from tunefork.server.gate import Gate
from tunefork.server.inference.engine import Engine
from tunefork.server.jobs.queue import JobQueue
from tunefork.server.problems import ApiError, from_http, from_validation
from tunefork.server.routes import chat, completions, files, jobs, models, permissions, uploads
from tunefork.server.settings import Settings
from tunefork.server.state import Server
from tunefork.server.store import ROOM, Store


def create_app(settings: Settings, store: Store) -> FastAPI:
    """The server on an open store. The queue runs from the application's start to its end."""
    server = Server(settings, store, JobQueue(settings, store), Engine(settings))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not store.shared:  # else they may be what another server is writing
            clean_leftovers(settings.blobs_path)
        server.queue.start()
        yield
        await run_in_threadpool(server.engine.close)
        await run_in_threadpool(server.queue.close)

    app = FastAPI(
        title="Tunefork", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.router.redirect_slashes = False
    app.state.server = server
    app.add_middleware(Gate, settings=settings, store=store)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unknown)
    for part in (files, uploads, jobs, permissions, models, chat, completions):
        app.include_router(part.router)

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    def readyz() -> Response:
        """Requests can be served: the database answers, jobs are moved on, and the disk has room."""
        with store.read() as db:
            db.execute(text("SELECT 1"))
        ready = {"queue": server.queue.alive, "disk": shutil.disk_usage(settings.data).free > ROOM}
        fine = all(ready.values())
        return JSONResponse({"status": "ok" if fine else "not ready", **ready}, 200 if fine else 503)

    @app.api_route("/v1/responses{rest:path}", methods=["GET", "POST", "DELETE"])
    def responses(rest: str) -> Response:
        message = "The Responses API is not served here. Use client.chat.completions (/v1/chat/completions)."
        raise ApiError(message, code="unsupported_endpoint")

    return app


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(list(error.errors())).response()


def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # raised while the body was read, which FastAPI takes for a bad body
        return error.__cause__.response()
    return from_http(error.status_code, request.method, request.url.path, error.detail).response()
