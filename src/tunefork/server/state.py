"""What every request can reach."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from tunefork.server.inference.engine import Engine
from tunefork.server.jobs.queue import JobQueue
from tunefork.server.settings import Settings
from tunefork.server.store import Store


@dataclass(frozen=True, slots=True)
class Server:
    settings: Settings
    store: Store
    queue: JobQueue
    engine: Engine


def server_of(request: Request) -> Server:
    return request.app.state.server
