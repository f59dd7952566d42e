"""A database of votes: found by path or URL, opened, and what goes wrong with it in words."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import RunFailed, UserError, whole_message
from rlhf_ray.votes import schema

WAIT_S = 10.0  # for another process that writes, and for a server to answer


def database_url(text: str) -> sa.URL:
    """The URL that a path, sqlite:///FILE or postgresql://... stands for. UserError for others."""
    if "://" not in text:
        if not text:
            raise UserError("the database of votes is ''; give a file, for example votes.db")
        return sa.URL.create("sqlite", database=str(expanded(text).absolute()))
    try:
        url = sa.make_url(text)
    except (SQLAlchemyError, ValueError) as error:
        scheme = text.partition("://")[0]
        raise UserError(f"'{scheme}://...' is no database URL ({type(error).__name__}); {_KINDS}") from error
    kind = url.get_backend_name()
    if kind == "sqlite":
        if not url.database or url.database == ":memory:" or url.query:
            raise UserError(f"'{text}' names no file, and votes must outlive the process; give sqlite:///FILE")
        return url.set(drivername="sqlite", database=str(expanded(url.database).absolute()))
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    raise UserError(f"'{url.render_as_string()}' is of the kind '{kind}'; {_KINDS}")


_KINDS = "votes are kept in a SQLite file (a path, or sqlite:///FILE) or in PostgreSQL (postgresql://USER@HOST/NAME)"


def name_of(url: sa.URL) -> str:
    """For messages: the file, or the URL without its password."""
    return (
        str(url.database) if url.get_backend_name() == "sqlite" else url.set(drivername="postgresql").render_as_string()
    )


class Database:
    """An open database of votes with the schema that this code knows.

    create: make the file (not a PostgreSQL database) and the tables where there are none, with this held-out share of the
    prompts; a share that is there already stays. UserError for what can't be opened, and for another schema. Threads may
    share one.
    """

    def __init__(self, text: str, *, create: bool = False, held_out_share: float = 0.1):
        url = database_url(text)
        self.name = name_of(url)
        if not 0 <= held_out_share < 1:
            raise UserError(f"the held-out share of votes is {held_out_share}; give a number from 0 up to 1")
        self._engine = _engine(url, self.name, create=create)
        self._writing = self._engine.execution_options(writes=True)
        with ExitStack() as stack:
            stack.callback(self.close)
            found = self._opened(create, held_out_share)
            if found is None:
                raise UserError(
                    f"{self.name} holds no votes: it has no table '{schema.schema_version.name}'; correct the name"
                )
            schema.check(found[0], self.name)
            stack.pop_all()
        self.held_out_share = found[1]

    def _opened(self, create: bool, held_out_share: float) -> tuple[int, float] | None:
        with _opening(self.name):
            with self._engine.begin() as connection:
                found = schema.read(connection)
            if found is not None or not create:
                return found
            with self._writing.begin() as connection:
                schema.create(connection, held_out_share)
            with self._engine.begin() as connection:
                return schema.read(connection)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that only reads."""
        with _in_use(self.name), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is stored, flushed to the disk, when the block ends; where the block raises, nothing is."""
        with _in_use(self.name), self._writing.begin() as connection:
            yield connection

    def close(self) -> None:
        self._engine.dispose()


def migrate(text: str) -> tuple[int, int]:
    """Bring a database to the schema that this code knows: (version before, version now)."""
    url = database_url(text)
    engine = _engine(url, name_of(url), create=False)
    try:
        with _opening(name_of(url)), engine.execution_options(writes=True).begin() as connection:
            return schema.migrate(connection, name_of(url))
    finally:
        engine.dispose()


def _engine(url: sa.URL, name: str, *, create: bool) -> sa.Engine:
    if url.get_backend_name() == "sqlite":
        file = Path(name)
        if not create and not file.exists():
            raise UserError(
                f"there is no database of votes at '{name}'; correct the name (a server makes one when it starts)"
            )
        if file.is_dir():
            raise UserError(f"'{name}' is a folder, and votes are kept in a file; name one, for example {file / 'votes.db'}")
        if not file.parent.is_dir():
            raise UserError(f"'{name}' can't be made: there is no folder {file.parent}; make it, or correct the name")
        engine = sa.create_engine(url, connect_args={"timeout": WAIT_S}, pool_timeout=WAIT_S)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    wait_ms = int(WAIT_S * 1000)
    arguments = {
        "connect_timeout": int(WAIT_S),
        "options": f"-c lock_timeout={wait_ms} -c statement_timeout={6 * wait_ms}",
    }
    arguments |= {"application_name": "rlhf-ray votes"}
    for given in url.query:
        arguments.pop(given, None)  # the user's own says it
    try:
        return sa.create_engine(
            url, connect_args=arguments, pool_pre_ping=True, pool_timeout=WAIT_S, isolation_level="READ COMMITTED"
        )
    except ImportError as error:
        raise UserError(f"{name} needs the driver of PostgreSQL; run: pip install 'psycopg[binary]'") from error


def _prepare_sqlite(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # `_begin_sqlite` begins the transactions
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")  # a stored vote is on the disk, also when the power fails
    deadline = time.monotonic() + WAIT_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:  # of two that open a new file at once, one does not wait but fails
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: sa.Connection) -> None:
    # A reader that turns into a writer is refused at once when another has written since, whatever the timeout.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """A database that can't be opened is the user's to mend."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise UserError(
            f"{name} can't be opened as a database of votes ({_words(error)}); correct its name, or mend that"
        ) from error


@contextmanager
def _in_use(name: str) -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PoolTimeout, sqlite3.Error) as error:
        raise RunFailed(
            f"the database of votes {name} failed ({_words(error)}); ask again: what was stored is not stored twice"
        ) from error


def _words(error: Exception) -> str:
    return whole_message(error.orig if isinstance(error, DBAPIError) and error.orig is not None else error)
