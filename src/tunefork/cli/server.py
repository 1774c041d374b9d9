"""`tunefork serve`, and the keys of those who may use it."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from tunefork.cli.screen import Json, emit, empty_table, escape, screen

Data = Annotated[Path, typer.Option("--data", help="the server's folder: database, files, jobs")]
Database = Annotated[
    str | None,
    typer.Option(
        "--database", envvar="TUNEFORK_DATABASE", help="URL of a PostgreSQL; a sqlite file in --data if absent"
    ),
]
HERE = Path("tunefork-data")
keys_app = typer.Typer(help="API keys of `tunefork serve`.", no_args_is_help=True)


def serve(
    host: Annotated[str, typer.Option("--host", help="beyond this machine only with a key")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    data: Data = HERE,
    database: Database = None,
    models: Annotated[Path | None, typer.Option("--models", help="models.yaml; without it the embedded model")] = None,
    slots: Annotated[int, typer.Option("--slots", min=0, help="jobs that train at the same time")] = 1,
    recover: Annotated[bool, typer.Option("--recover", help="build a lost database again from --data")] = False,
) -> None:
    """A fine-tuning service that the official openai client drives unchanged."""
    from tunefork import server

    server.serve(data=data, database=database, host=host, port=port, models=models, slots=slots, recover=recover)


@keys_app.command("create")
def create(
    project: Annotated[str, typer.Option("--project", help="whose files, jobs and models it opens")],
    data: Data = HERE,
    database: Database = None,
    name: Annotated[str, typer.Option("--name", help="to tell keys apart")] = "",
    scopes: Annotated[str | None, typer.Option("--scopes", help="comma-separated; all when absent")] = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once; only its hash is kept."""
    from tunefork import server

    chosen = [scope.strip() for scope in scopes.split(",")] if scopes is not None else server.SCOPES
    secret, row = server.create_key(server.open_store(data, database), project=project, name=name, scopes=chosen)
    if as_json:
        emit({"key": secret, "id": row.id, "project": row.project_id, "scopes": row.scopes})
        return
    sys.stderr.write(f"{row.id} for {row.project_id}; the key is shown this once:\n")
    sys.stdout.write(f"{secret}\n")


@keys_app.command("list")
def list_(data: Data = HERE, database: Database = None, as_json: Json = False) -> None:
    """The keys there are; what they are is not kept."""
    from tunefork import server

    rows = server.list_keys(server.open_store(data, database))
    if as_json:
        fields = ("id", "project_id", "name", "scopes", "created_at", "revoked_at")
        emit([{field: getattr(row, field) for field in fields} for row in rows])
        return
    shown = empty_table("id", "project", "name", "made", "revoked")
    for row in rows:
        made, revoked = (
            f"{datetime.fromtimestamp(t):%Y-%m-%d %H:%M}" if t else "" for t in (row.created_at, row.revoked_at)
        )
        shown.add_row(row.id, escape(row.project_id), escape(row.name), made, revoked)
    screen(False).print(shown)


@keys_app.command("revoke")
def revoke(
    id: Annotated[str, typer.Argument(help="as `tunefork keys list` shows it")],
    data: Data = HERE,
    database: Database = None,
) -> None:
    """From now on the key opens nothing."""
    from tunefork import server

    server.revoke_key(server.open_store(data, database), id)
