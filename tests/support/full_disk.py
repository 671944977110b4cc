"""A disk that is full from a chosen write on: every write of this process under a folder, counted, and refused as the system would.

What counts as a write: a file or folder that is made, a rename, a link, data written in place or flushed to the disk, and in SQLite every
statement that changes something, and the commit of it. Nothing else of the process notices.
"""

import contextlib
import errno
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

_CHANGES = ("INSERT", "UPDATE", "DELETE", "CREATE", "REPLACE", "ALTER", "DROP")
_WATCHED: "list[FullDisk]" = []
#: `make chaos` tries every write, the ordinary run of the tests some of each kind.
FULL = os.environ.get("CHAOS", "") == "full"
#: Bounds a hang. Every write of a run was tried in 7 minutes on two cores with a load of 11.
WITHIN_S = 3600 if FULL else 300


def tried(writes: Sequence[str], *, once: bool) -> list[tuple[int, str]]:
    """The writes at which a disk is filled, with their numbers."""
    return list(enumerate(writes))[:: 1 if FULL else 16 if once else 8]


class FullDisk:
    """The disk under a folder.

    Attributes:
        seen: every write since the last `fill`, in words.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._left: int | None = None
        self._once = False
        self.seen: list[str] = []

    def fill(self, at: int | None, *, once: bool = False) -> None:
        """Be full from the write of this number on (0: the next one), or at that one alone; None: count only."""
        self.seen.clear()
        self._left, self._once = at, once

    def free(self) -> None:
        """Have space again."""
        self._left = None

    def holds(self, path: Any) -> bool:
        """Whether a path lies on this disk."""
        text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        return text.startswith("/") and Path(text).parent.resolve().is_relative_to(self._folder)

    def full(self, what: str) -> bool:
        """Count a write; whether it is refused."""
        self.seen.append(what)
        if self._left is None:
            return False
        self._left -= 1
        return self._left == -1 if self._once else self._left < 0

    def write(self, what: str, path: Any) -> None:
        """Count a write to a path.

        Raises:
            OSError: ENOSPC, the disk is full.
        """
        if self.holds(path) and self.full(f"{what} {Path(os.fsdecode(path)).name}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))


def _watch(event: str, given: tuple[Any, ...]) -> None:
    for disk in _WATCHED:
        if event == "open" and isinstance(given[2], int) and given[2] & os.O_CREAT:
            if disk.holds(given[0]) and not Path(os.fsdecode(given[0])).exists():
                disk.write("make", given[0])
        elif event == "os.mkdir" and not Path(os.fsdecode(given[0])).exists():
            disk.write("mkdir", given[0])
        elif event in ("os.rename", "os.link"):
            disk.write(event.removeprefix("os."), given[1])


def _of(handle: int) -> str:
    return str(Path(f"/proc/self/fd/{handle}").readlink()).removesuffix(" (deleted)")


class _Cursor(sqlite3.Cursor):
    def execute(self, sql: str, *more: Any) -> sqlite3.Cursor:  # type: ignore[override]
        _tell(self.connection, sql)
        return super().execute(sql, *more)


class _Connection(sqlite3.Connection):
    """A connection whose database lies on a watched disk, or not."""

    file = ""
    changed = False

    def cursor(self, *_: Any, **__: Any) -> sqlite3.Cursor:  # type: ignore[override]
        return super().cursor(_Cursor)

    def execute(self, sql: str, *more: Any) -> sqlite3.Cursor:
        return self.cursor().execute(sql, *more)

    def commit(self) -> None:
        _tell(self, "COMMIT")
        super().commit()


def _tell(connection: sqlite3.Connection, sql: str) -> None:
    """Count what changes something, and the commit of what did. A commit that is refused rolls back, as SQLite's does."""
    assert isinstance(connection, _Connection)
    word = sql.lstrip().split(None, 1)[0].upper()
    counts = word in _CHANGES or (word == "COMMIT" and connection.changed)
    connection.changed = word in _CHANGES or (connection.changed and word not in ("BEGIN", "COMMIT", "ROLLBACK"))
    for disk in _WATCHED:
        if counts and disk.holds(connection.file) and disk.full(f"{word} in {Path(connection.file).name}"):
            raise sqlite3.OperationalError("database or disk is full")


def _connecting(connect: Callable[..., Any]) -> Callable[..., sqlite3.Connection]:
    def made(database: Any, *given: Any, **options: Any) -> sqlite3.Connection:
        connection: _Connection = connect(database, *given, **(options | {"factory": _Connection}))
        connection.file = os.fsdecode(database)
        return connection

    return made


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[FullDisk]:
    """Watch a folder's writes. Databases count when they are opened inside."""
    if not getattr(sys, "_pathfed_disk_hook", False):
        sys.addaudithook(_watch)  # for good: there is no way to take one off
        sys._pathfed_disk_hook = True  # type: ignore[attr-defined]
    disk = FullDisk(folder)
    with pytest.MonkeyPatch.context() as patch:

        def before(name: str) -> None:
            work = getattr(os, name)

            def checked(handle: int, *given: Any) -> Any:
                for one in _WATCHED:
                    one.write(name, _of(handle))
                return work(handle, *given)

            patch.setattr(os, name, checked)

        before("fsync")
        before("pwrite")
        connect = _connecting(sqlite3.connect)
        patch.setattr(sqlite3, "connect", connect)
        patch.setattr(sqlite3.dbapi2, "connect", connect)
        _WATCHED.append(disk)
        try:
            yield disk
        finally:
            _WATCHED.remove(disk)
