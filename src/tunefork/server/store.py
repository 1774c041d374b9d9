"""The store: one row a key, file, upload, job, event, model. Sqlite in WAL mode, or PostgreSQL."""

from __future__ import annotations

import errno
import secrets
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Connection,
    ForeignKey,
    Integer,
    UniqueConstraint,
    create_engine,
    event,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tunefork.errors import MissingExtraError, RecipeError, RunError
from tunefork.server.settings import Settings

SCHEMA = 1
ROOM = 64 * 2**20  # bytes of free disk under which nothing new is begun
_FULL = {errno.ENOSPC, errno.EDQUOT}
_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str, length: int = 24) -> str:
    """A fresh id such as `ftjob-4Xw…`, of letters and digits only: safe in a path."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


def now() -> int:
    return int(time.time())


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that the disk has no room: in a file's words, or the database's."""
    if isinstance(error, OperationalError):
        return "full" in str(error.orig)
    full = isinstance(error, OSError) and error.errno in _FULL
    return full or (error is not None and disk_is_full(error.__cause__))


class Row(DeclarativeBase):
    """`seq` orders rows as they were made, whatever the clock did."""

    type_annotation_map = {  # noqa: RUF012
        int: BigInteger,  # seconds, too
        **dict.fromkeys((dict[str, Any], list[str], list[dict[str, Any]]), JSON(none_as_null=True)),
    }

    seq: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, sort_order=-1)
    created_at: Mapped[int] = mapped_column(default=now)


class Schema(Row):
    __tablename__ = "schema"
    version: Mapped[int]


class Key(Row):
    """An API key. Only a hash of it is kept; a key opens one project."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(unique=True)
    hash: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[str]
    name: Mapped[str]
    scopes: Mapped[list[str]]
    revoked_at: Mapped[int | None]


class File(Row):
    __tablename__ = "files"
    id: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[str] = mapped_column(index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]
    expires_at: Mapped[int | None]


class Upload(Row):
    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[str] = mapped_column(index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]
    status: Mapped[str] = mapped_column(default="pending")
    expires_at: Mapped[int]
    file_seconds: Mapped[int | None]  # until the finished file expires
    file_id: Mapped[str | None]


class Part(Row):
    __tablename__ = "parts"
    id: Mapped[str] = mapped_column(unique=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int]


class Job(Row):
    """A fine-tuning job. `status` changes only through `jobs.states.move`."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[str] = mapped_column(index=True)
    key_id: Mapped[str]
    status: Mapped[str] = mapped_column(default="validating_files", index=True)
    base: Mapped[str]  # name in the catalogue
    asked_model: Mapped[str]  # as the request had it, perhaps an alias
    model_name: Mapped[str] = mapped_column(unique=True)  # of what is being made
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    suffix: Mapped[str | None]
    seed: Mapped[int]
    method: Mapped[dict[str, Any]]  # {"type", "hyperparameters"}; `auto` until the files are validated
    layout: Mapped[str | None]  # of the training rows: chat, completion, preference
    integrations: Mapped[list[dict[str, Any]] | None]
    meta: Mapped[dict[str, Any] | None]
    extension: Mapped[dict[str, Any] | None]  # what the request had under `tunefork`
    started_at: Mapped[int | None]
    finished_at: Mapped[int | None]
    estimated_finish: Mapped[int | None]
    trained_tokens: Mapped[int | None]
    result_file: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    step: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)  # counts starts of a worker: a former worker's writes are refused
    deaths: Mapped[int] = mapped_column(default=0)  # of workers, since `saved_step`
    saved_step: Mapped[int] = mapped_column(default=0)


class Event(Row):
    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job_id", "step"),)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    level: Mapped[str] = mapped_column(default="info")
    message: Mapped[str]
    type: Mapped[str] = mapped_column(default="message")
    data: Mapped[dict[str, Any] | None]
    step: Mapped[int | None]  # of metrics


class Model(Row):
    """A tuned model: a job's result, or, with a `step`, one of its checkpoints."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(unique=True)
    project_id: Mapped[str] = mapped_column(index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    base: Mapped[str]
    folder: Mapped[str]  # in the job's own
    step: Mapped[int | None]
    metrics: Mapped[dict[str, Any] | None]


class Permission(Row):
    """Lets another project use a tuned model."""

    __tablename__ = "permissions"
    __table_args__ = (UniqueConstraint("model", "project_id"),)
    id: Mapped[str] = mapped_column(unique=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.name", ondelete="CASCADE"), index=True)
    project_id: Mapped[str]


class Store:
    """Sessions on the database: `read` sees one state of it, `write` is a transaction that happens whole or not."""

    def __init__(self, settings: Settings, *, check: bool = True) -> None:
        """Opens the database; with `check` it is made where it is missing, and read through for damage.

        Raises RunError for one that is damaged or of another version, RecipeError for a URL of no PostgreSQL.
        """
        try:
            self.engine = create_engine(settings.database_url)
        except ImportError as error:
            raise MissingExtraError(error.name or "psycopg", "server-postgres", "`--database`") from None
        except ArgumentError:
            raise _other_database() from None
        self.shared = settings.database is not None
        if self.shared and self.engine.dialect.name != "postgresql":
            raise _other_database()
        self._holder: Connection | None = None
        self._writing = self.engine.execution_options(write=True)
        if self.shared:
            self._reading = self.engine.execution_options(isolation_level="REPEATABLE READ")
            event.listen(self.engine, "begin", _begin_postgres)
        else:
            self._reading = self.engine
            event.listen(self.engine, "connect", _connect_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        if not check:
            return
        try:
            self._check(settings)
        except OperationalError as error:
            raise RunError(
                f"The database {self.engine.url} must be there, writable, and free. Received: {error.orig}. "
                "Try again, or another --data."
            ) from error
        except DatabaseError as error:
            raise RunError(
                f"The database {self.engine.url} must be whole. Received: {error.orig}. Try a backup, or "
                "`tunefork serve --recover`, which builds it again from the folders beside it."
            ) from error

    def _check(self, settings: Settings) -> None:
        with self.engine.connect() as connection:
            if not self.shared:
                found = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
                if found != "ok":
                    raise RunError(
                        f"The database {settings.database_path} must be whole. Received: {found}. Try a backup, or "
                        "`tunefork serve --recover`, which builds it again from the folders beside it."
                    )
        with self.write() as db:
            new = not inspect(db.connection()).has_table(Schema.__tablename__)
            Row.metadata.create_all(db.connection())
            if new:
                db.add(Schema(version=SCHEMA))
            version = db.query(Schema.version).scalar()
            if not new and version != SCHEMA:
                raise RunError(f"The database must be of version {SCHEMA}. Received {version}. Try a newer Tunefork.")

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self._reading) as db:
            yield db

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Commits when the block ends; takes everything back when it raises. Rows may be read afterwards."""
        with Session(self._writing, expire_on_commit=False) as db, db.begin():
            yield db

    def hold(self, id: str) -> bool:
        """Shows other servers on this store that a job runs here, until `release` or the end of this process, however
        it ends. False where another server has it."""
        return self._held(func.pg_try_advisory_lock, id)

    def release(self, id: str) -> None:
        self._held(func.pg_advisory_unlock, id)

    def is_held(self, db: Session, id: str) -> bool:
        """Whether a server that lives runs the job."""
        return self.shared and not db.scalar(select(func.pg_try_advisory_xact_lock(func.hashtext(id))))

    def _held(self, change: Any, id: str) -> bool:
        """A lock belongs to a connection: one is kept for all of them. Where it breaks, jobs are taken for left."""
        if not self.shared:
            return True
        self._holder = self._holder or self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            return bool(self._holder.scalar(select(change(func.hashtext(id)))))
        except DatabaseError:
            self._holder.close()
            self._holder = None
            raise

    def close(self) -> None:
        if self._holder is not None:
            self._holder.close()
        self.engine.dispose()


def _other_database() -> RecipeError:
    return RecipeError(
        "`--database` must be the URL of a PostgreSQL. Received another. Try postgresql+psycopg://USER@HOST/NAME."
    )


def _connect_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin_sqlite`
    for pragma in ("busy_timeout=60000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    """A transaction that will write takes the lock at once: two that read first and write later would deadlock."""
    write = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _begin_postgres(connection: Connection) -> None:
    """One transaction at a time may write, of all servers, as in sqlite."""
    if connection.get_execution_options().get("write"):
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(0, 0)")  # apart from the one number of a job
