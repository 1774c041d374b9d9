"""Everything passes here first: a request id, who is asking, how long a body may be, and errors nobody foresaw."""

from __future__ import annotations

import logging
import time

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import DataError, OperationalError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunefork.server.auth import identify
from tunefork.server.problems import ApiError
from tunefork.server.settings import Settings
from tunefork.server.store import Store, disk_is_full, new_id

_log = logging.getLogger("tunefork.server")
_OPEN = ("/healthz", "/readyz")
_FORM_ROOM = 2**20  # of a multipart body, beside the file in it


class Gate:
    """ASGI middleware. Puts `request_id` and `caller` into the request's state."""

    def __init__(self, app: ASGIApp, settings: Settings, store: Store) -> None:
        self.app, self.settings, self.store = app, settings, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        request_id = new_id("req_", 32)
        scope.setdefault("state", {})["request_id"] = request_id

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - started)))
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            headers = Headers(scope=scope)
            if scope["path"] not in _OPEN:
                scope["state"]["caller"] = await run_in_threadpool(
                    identify, self.store, headers, loopback=self.settings.loopback
                )
            await self.app(scope, self._limited(scope["path"], headers, receive), answer)
        except Exception as error:  # noqa: BLE001 - the edge of a request: the log gets the traceback, the client a sentence
            problem = _problem(error)
            if problem.status == 500:
                _log.exception("%s failed", request_id)
            elif problem.status > 500:
                _log.warning("%s %s", request_id, problem.message)
            if not status:
                await problem.response()(scope, receive, answer)
        route = scope.get("route")  # its template, not the path: a path may hold names of people's models
        where = getattr(route, "path", "-")
        _log.info(
            "%s %s %s %s %.0fms", request_id, scope["method"], where, status, 1000 * (time.perf_counter() - started)
        )

    def _limited(self, path: str, headers: Headers, receive: Receive) -> Receive:
        """Refuses a body that is or becomes too long, before or while it is read."""
        if path == "/v1/files":
            limit = self.settings.file_bytes + _FORM_ROOM
        elif path.startswith("/v1/uploads/") and path.endswith("/parts"):
            limit = self.settings.part_bytes + _FORM_ROOM
        else:
            limit = self.settings.json_bytes
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > limit:
            raise _too_long(limit)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise _too_long(limit)
            return message

        return counted


def _too_long(limit: int) -> ApiError:
    message = f"Maximum content size limit ({limit}) exceeded. Send less, or use the Uploads API for a large file."
    return ApiError(message, status=413, code="request_too_large")


def _problem(error: Exception) -> ApiError:
    """What a client hears of an error that no route has foreseen."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return ApiError("The client went away.", status=499)
    if disk_is_full(error):
        message = "The server's disk is full; nothing was kept of this request. Try again when there is room."
        return ApiError(message, status=507, type="server_error", code="insufficient_storage")
    if isinstance(error, DataError):  # PostgreSQL has no such text
        return ApiError("Text of this request must have no NUL character.", code="invalid_value")
    if isinstance(error, OperationalError):
        message = "The server's database cannot be reached at the moment. Try again."
        return ApiError(message, status=503, type="server_error", code="service_unavailable")
    message = "The server had an error while processing your request. Its log has more under this request's id."
    return ApiError(message, status=500, type="server_error")
