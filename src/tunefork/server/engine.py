"""The seam to inference: what the rest of the server asks of whatever answers chats."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Engine(Protocol):
    """Answers for the models of `tunefork.server.models.Served`; its routes are its own business."""

    def forget(self, folder: Path) -> None:
        """Lets go of an artefact that is about to be deleted; one that is not loaded is fine."""
        ...

    def close(self) -> None: ...


class NoEngine:
    """A server that trains and serves files, and answers no chats."""

    def forget(self, folder: Path) -> None:
        pass

    def close(self) -> None:
        pass
