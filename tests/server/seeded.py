"""A server with the objects that openai-python's own tests ask for, put back before every request.

`python -m tests.server.seeded PORT [FILE]` serves until it is ended; with FILE it wants a key, and writes one there.
openai-python's tests were written against a mock that holds nothing: they delete the same file 8 times, and send "md5"
as the MD5 sum of an upload. So every request finds the rows as they were, and that sum is taken out; all else is the
real server.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import delete
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.server.scenes import rows, settings_in
from tunefork.recipe import ModelSection
from tunefork.server import Catalogue, Settings, Store, create_app, create_key
from tunefork.server.blobs import write_blob
from tunefork.server.jobs.states import VALIDATING
from tunefork.server.store import Event, File, Job, Model, Part, Permission, Row, Upload

PROJECT = "proj_default"
JOB = "ft-AF1WoRqd3aJAHsqc9NY7iL8F"
MODELS = ("ft:gpt-4o-mini:acemeco:suffix:abc123", "ft:gpt-4o-mini-2024-07-18:org:weather:B7R9VjQd", JOB)
UPLOAD, PART, CONTENT = "upload_abc123", "string", b"content"


def seeded_rows() -> list[Row]:
    files = [
        File(id=id, project_id=PROJECT, filename="f.jsonl", purpose="fine-tune", bytes=len(rows()), created_at=1)
        for id in ("file-abc123", "file_id", "string")
    ]
    chosen = {"n_epochs": 1, "batch_size": 1, "learning_rate_multiplier": 1.0}
    job = Job(
        id=JOB, project_id=PROJECT, key_id="k", status="running", base="fork-tiny", asked_model="fork-tiny",
        model_name=MODELS[0], training_file="file-abc123", seed=1, layout="chat",
        method={"type": "supervised", "hyperparameters": chosen, "examples": 10},
    )  # fmt: skip
    upload = Upload(id=UPLOAD, project_id=PROJECT, filename="f", purpose="batch", bytes=len(CONTENT), expires_at=2**40)
    part = Part(id=PART, upload_id=UPLOAD, bytes=len(CONTENT))
    made: dict[str, Any] = {"project_id": PROJECT, "job_id": JOB, "base": "fork-tiny", "folder": "models/none"}
    models = [
        Model(id=f"ftckpt_{n}", name=name, step=n + 1, metrics={"step": 1}, **made) for n, name in enumerate(MODELS)
    ]
    permission = Permission(id="cp_zc4Q7MP6XxulcVzj4MZdwsAB", model=MODELS[1], project_id="proj_other")
    event = Event(id="ftevent-1", job_id=JOB, message="Created fine-tuning job")
    return [*files, job, upload, part, *models, permission, event]


class Seeded:
    """ASGI middleware: the rows as they were, then the request."""

    def __init__(self, app: ASGIApp, settings: Settings, store: Store) -> None:
        self.app, self.settings, self.store = app, settings, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._seed(scope["path"])
        await self.app(scope, self._with_right_sum(receive), send)

    def _seed(self, path: str) -> None:
        with self.store.write() as db:
            for kind in (Permission, Model, Event, Part, Upload, File):
                db.execute(delete(kind))
            db.execute(delete(Job).where(Job.status != VALIDATING))  # a thread reads those
            for row in seeded_rows():
                if path.endswith("/parts") and isinstance(row, Part):
                    continue  # there is room for one
                if path.endswith("/parts") and isinstance(row, Upload):
                    row.bytes = 2**20
                db.add(row)
                db.flush()
        for row in seeded_rows():
            if isinstance(row, File):
                _seed_blob(self.settings.blobs_path / row.id, rows(), row)
            if isinstance(row, Part):
                _seed_blob(self.settings.parts_path / UPLOAD / PART, CONTENT, row)

    def _with_right_sum(self, receive: Receive) -> Receive:
        async def replaced() -> Message:
            message = await receive()
            body = message.get("body", b"")
            if b'"md5":"md5"' in body:  # as long as before: the length has been told already
                message["body"] = body.replace(b'"md5":"md5"', b'"md5":null ')
            return message

        return replaced


def _seed_blob(folder: Path, content: bytes, row: Row) -> None:
    if not folder.exists():  # nothing changes one that is there
        write_blob(folder, [content], row)


def main() -> None:
    base = ModelSection(max_length=96)  # short answers: what is looked at is their shape
    catalogue = Catalogue(
        models={"fork-tiny": base},
        aliases=dict.fromkeys(("gpt-4o-mini", "gpt-5.4", "gpt-3.5-turbo-instruct"), "fork-tiny"),
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_in(Path(folder) / "data", catalogue=catalogue)
        store = Store(settings)
        if len(sys.argv) > 2:
            Path(sys.argv[2]).write_text(create_key(store, project=PROJECT)[0])
        app = create_app(settings, store)
        uvicorn.run(Seeded(app, settings, store), port=int(sys.argv[1]), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
