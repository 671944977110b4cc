"""One database, SQLite or PostgreSQL: connections, transactions, errors, and the migration head.

SQLite is used with write-ahead logging, a full flush at each commit, foreign keys on, and a transaction that takes the write lock when
it begins, so that writers wait for each other (30 s at most) and never fail half-way for want of the lock.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool

from pathfed_common.errors import ErrorCode, RoundError

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MS = 30_000
_ADVISORY_LOCK = 0x70617468666564  # "pathfed": one migration at a time on PostgreSQL


class Database:
    """A database by its URL. Nothing is touched before `open`.

    URLs: ``sqlite:////absolute/path.db`` or ``postgresql://user:password@host/name``.
    """

    def __init__(self, url: str) -> None:
        self._url = _parse(url)
        self._engine = _engine(self._url)

    @property
    def address(self) -> str:
        """The URL without its password."""
        return self._url.render_as_string(hide_password=True)

    def open(self) -> Self:
        """Check that the database can be reached and is at this version's schema.

        Raises:
            RoundError: PF512, it cannot be reached; PF513, its schema is older, newer or none.
        """
        _demand_file(self._url)
        with self._read() as connection:
            found = MigrationContext.configure(connection).get_current_heads()
        wanted = head()
        if found != (wanted,):
            self.close()
            raise RoundError(
                ErrorCode.DATABASE_SCHEMA,
                "the database is not at the schema of this version of pathfed",
                where=self.address,
                value=f"found {', '.join(found) or 'none'}, wanted {wanted}",
                remedy="start the server with the pathfed version to be used, which migrates it, or use the version it was migrated with",
            )
        return self

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A transaction for reading that sees one state of the database, however long it takes."""
        with _told(self.address), self._engine.connect() as connection:
            # SQLite's transactions see one state by themselves, from their first read on.
            options = {"isolation_level": "REPEATABLE READ"} if connection.dialect.name == "postgresql" else {}
            yield connection.execution_options(pathfed_reads=True, **options)

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with _told(self.address), self._engine.connect().execution_options(pathfed_reads=True) as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with _told(self.address), self._engine.begin() as connection:
            yield connection


def migrate(url: str) -> None:
    """Bring a database to this version's schema, creating it where it is empty: all steps in one transaction, or none.

    Raises:
        RoundError: PF512, it cannot be reached; PF513, it is newer than this version, or a step failed (nothing is changed then).
    """
    _in_one_step(_parse(url), _upgrade)


def migrate_existing(url: str) -> None:
    """Bring a database of ours to this version's schema. One that holds nothing of ours is left as it is: opening it says so.

    A server that starts on an empty database would take itself for a new consortium.

    Raises:
        RoundError: PF512, it cannot be reached, or its file is missing; PF513, as for `migrate`.
    """
    parsed = _parse(url)
    _demand_file(parsed)

    def upgrade(connection: Connection, address: str) -> None:
        if MigrationContext.configure(connection).get_current_heads():
            _upgrade(connection, address)

    _in_one_step(parsed, upgrade)


def _in_one_step(url: URL, step: Callable[[Connection, str], None]) -> None:
    """Run a step on the schema in a transaction that no other process's step runs beside."""
    engine = _engine(url)
    address = url.render_as_string(hide_password=True)
    try:
        with _told(address), engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            step(connection, address)
    finally:
        engine.dispose()


def _upgrade(connection: Connection, address: str) -> None:
    try:
        command.upgrade(alembic_config(connection), "head")
    except (CommandError, DBAPIError) as error:
        raise RoundError(
            ErrorCode.DATABASE_SCHEMA,
            f"the migration failed and changed nothing: {str(error).splitlines()[0]}",
            where=address,
            remedy="use a pathfed version at least as new as the one that migrated it last",
        ) from error


def head() -> str:
    """Name of the newest migration this version has."""
    found = ScriptDirectory(str(_MIGRATIONS)).get_current_head()
    if found is None:
        raise RuntimeError("the package holds no migration")
    return found


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration for the packaged migrations on an open connection, whose transaction they join."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise RoundError(
            ErrorCode.DATABASE_UNAVAILABLE, "not a database URL", remedy="use sqlite:////path or postgresql://user@host/name"
        ) from None
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise RoundError(ErrorCode.DATABASE_UNAVAILABLE, "pathfed keeps its data in SQLite or PostgreSQL", value=parsed.get_backend_name())
    return parsed


def _engine(url: URL) -> Engine:
    try:
        if url.get_backend_name() == "sqlite":
            # A connection a transaction: connections of a file cost little, and none is then left open by a thread that ended.
            engine = create_engine(url, poolclass=NullPool)
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        return create_engine(url, pool_pre_ping=True)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise RoundError(ErrorCode.DATABASE_UNAVAILABLE, f"the database's driver is missing: {error}") from error


def _set_up_sqlite(connection: DBAPIConnection, _record: object) -> None:
    connection.isolation_level = None  # Python's own BEGIN leaves schema changes outside the transaction
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={_BUSY_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("pathfed_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _demand_file(url: URL) -> None:
    """SQLite would make an empty file where none is; a database that is not there cannot be reached."""
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).is_file():
        raise RoundError(
            ErrorCode.DATABASE_UNAVAILABLE, "there is no database file", where=url.database, remedy="make it with `pathfed-server init`"
        )


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Turn the driver's connection errors into ours, without the password."""
    try:
        yield
    except DatabaseError as error:
        # A damaged SQLite file raises the base class itself; the other subclasses are ours to answer for, or a trigger's refusal.
        if type(error) is not DatabaseError and not isinstance(error, OperationalError):
            raise
        raise RoundError(
            ErrorCode.DATABASE_UNAVAILABLE,
            f"the database cannot be used: {_first_line(error)}",
            where=address,
            remedy="check that it runs, that the address is right, and that this user may read and write it",
        ) from error


def _first_line(error: DBAPIError) -> str:
    cause: Any = error.orig
    with suppress(IndexError):
        return str(cause).splitlines()[0]
    return type(cause).__name__
