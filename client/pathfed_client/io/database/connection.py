"""The site database's file: opening it, its transactions, and its errors as ours."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import sqlalchemy as sa

from pathfed_client.io.database import schema
from pathfed_common.errors import ErrorCode, HostError, PathfedError

BUSY_TIMEOUT_S = 60
#: Below this, bytes, a disk counts as full: SQLite's shared-memory file alone takes half of it.
_LEAST_FREE = 64 * 1024


class SiteDatabase:
    """One site's database. Usable as a context manager; `close` gives its connections back.

    Raises (every method):
        HostError: the disk is full (PF901), or the file cannot be opened, locked, read or written (PF904).
    """

    def __init__(self, path: Path) -> None:
        """Open the database, making it if it is not there. Its folder must exist.

        Raises:
            HostError: made by a newer pathfed (PF905), or see above.
        """
        self.path = path
        try:
            path.touch(mode=0o600, exist_ok=True)
        except OSError as error:
            raise HostError(ErrorCode.HOME_UNUSABLE, f"the site database cannot be opened: {error.strerror}", where=path) from error
        self._engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_TIMEOUT_S})
        self._joint: sa.Connection | None = None
        sa.event.listen(self._engine, "connect", _on_connect)
        sa.event.listen(self._engine, "begin", _on_begin)
        try:
            with self._transaction() as connection:
                schema.prepare(connection, path)
        except BaseException:
            self.close()
            raise

    @property
    def tile_folder(self) -> Path:
        """Folder of the tile indexes, beside the database."""
        return self.path.parent / "tiles"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Safe to call twice."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sa.Connection]:
        """One transaction, committed on leaving; database errors become ours."""
        try:
            if self._joint is not None:
                yield self._joint
                return
            with self._engine.connect().execution_options(pathfed_write=write) as connection, connection.begin():
                yield connection
        except sa.exc.DatabaseError as error:
            raise _host_error(error, self.path) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all that is done inside be one transaction, and one flush to the disk. For one thread."""
        with self._transaction() as connection:
            outer, self._joint = self._joint, connection
            try:
                yield
            finally:
                self._joint = outer


def _on_connect(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # BEGIN is ours (below): the driver would start its transactions too late
    for pragma in (f"busy_timeout = {BUSY_TIMEOUT_S * 1000}", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _on_begin(connection: sa.Connection) -> None:
    # A writer takes the lock at once: a read that later turns into a write may fail without waiting.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("pathfed_write", True) else "BEGIN")


def file_is_damaged(error: BaseException | None) -> bool:
    """Whether a database error says that the file itself is torn or none of ours."""
    return isinstance(error, sa.exc.DatabaseError) and any(word in str(error.orig) for word in ("malformed", "is not a database"))


def _host_error(error: sa.exc.DatabaseError, path: Path) -> PathfedError:
    text = str(error.orig)
    if file_is_damaged(error):
        return HostError(
            ErrorCode.HOME_UNUSABLE,
            f"the site database is damaged: {text}",
            where=path,
            remedy="stop the client, keep the file as evidence, and look at the disk; an older copy forgets what was spent",
        )
    # SQLite calls it an I/O error where its shared-memory file cannot grow.
    if "disk is full" in text or ("disk I/O error" in text and shutil.disk_usage(path.parent).free < _LEAST_FREE):
        return HostError(
            ErrorCode.DISK_FULL,
            "the disk is full; nothing was half-written",
            where=path,
            remedy="free space there and run the command again",
        )
    return HostError(ErrorCode.HOME_UNUSABLE, f"the site database cannot be used: {text}", where=path)
