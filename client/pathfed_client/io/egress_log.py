"""The egress record on the disk: an append-only, hash-chained table in an SQLite file of its own.

Its own file, so that the relay, which writes it, never opens the database that names slides; so that a scan's long transactions do not hold
up what leaves; and so that the hospital's IT can copy it without copying anything else. Guarantees:

- an entry is on the disk when `append` returns (`synchronous=FULL`); several are one transaction;
- rows are append-only and gapless, enforced by triggers inside the database;
- each entry names the digest of the bytes of the one before: a row that was changed, dropped, swapped or added is found by `verified`.
  An end that was cut off is found against a head that was noted before;
- several processes may write it at once (WAL; writers wait for each other up to `BUSY_TIMEOUT_S`);
- a file that is gone is not made again silently: the record has a beginning, and `pathfed-site init` makes it. Nor is anything added to a
  file that was removed or replaced while it was open: its entries would be lost with it.

It is not signed: who can write in the home can write a whole new chain. Against that, note the head outside this machine.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pathfed_client.egress.entry import EgressEntry, EgressKind, Outgoing
from pathfed_common import digest, files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError

BUSY_TIMEOUT_S = 60
_SCHEMA = 1
_TABLES = """
CREATE TABLE egress (
    sequence INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    run TEXT,
    round_index INTEGER,
    entry BLOB NOT NULL
);
CREATE INDEX egress_at ON egress (at);
CREATE INDEX egress_round ON egress (run, round_index) WHERE run IS NOT NULL;
CREATE TRIGGER egress_no_update BEFORE UPDATE ON egress BEGIN SELECT RAISE(ABORT, 'the egress record is append-only'); END;
CREATE TRIGGER egress_no_delete BEFORE DELETE ON egress BEGIN SELECT RAISE(ABORT, 'the egress record is append-only'); END;
CREATE TRIGGER egress_gapless BEFORE INSERT ON egress WHEN NEW.sequence <> (SELECT coalesce(max(sequence), 0) + 1 FROM egress)
    BEGIN SELECT RAISE(ABORT, 'the egress record is gapless'); END;
"""


@dataclass(frozen=True)
class EgressHead:
    """The end of a verified record.

    Attributes:
        entries: how many there are.
        head: digest of the last one's bytes; None where there is none.
    """

    entries: int
    head: Digest | None


class EgressLog:
    """The site's egress record. Implements `egress.outlet.EgressPort`. One instance belongs to one thread at a time.

    Raises (every method):
        HostError: PF901, the disk is full; PF904, the file cannot be opened, locked, read or written; PF913, it is gone or damaged.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        """Open the record; an empty file becomes an empty record.

        Raises:
            HostError: PF913, there is no file: `create` makes one; PF905, a newer pathfed made it; and see above.
        """
        self.path = path
        self._now = now
        if not path.exists():
            remedy = "put it back; if it is lost, write down when and why, and begin a new one with an empty file of this name"
            raise HostError(
                ErrorCode.EGRESS_RECORD_DAMAGED, "the egress record is gone: nothing leaves without it", where=path, remedy=remedy
            )
        self._file = self._identity()
        with self._errors():
            self._connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    @classmethod
    def create(cls, path: Path) -> None:
        """Begin a record, readable by its owner alone. One that is there stays as it is."""
        try:
            path.touch(mode=0o600, exist_ok=True)
        except OSError as error:
            raise files.disk_error(error, path) from error
        cls(path).close()

    def _prepare(self) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            self._connection.execute(f"PRAGMA {pragma}").close()
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found > _SCHEMA:
            raise HostError(
                ErrorCode.SETTINGS_INVALID,
                "the egress record was made by a newer pathfed",
                where=self.path,
                value=f"schema {found}, this version knows {_SCHEMA}",
                remedy="install that pathfed version again",
            )
        if found < _SCHEMA:
            with self._transaction():
                if self._connection.execute("PRAGMA user_version").fetchone()[0] < _SCHEMA:
                    for statement in _statements(_TABLES):
                        self._connection.execute(statement)
                    self._connection.execute(f"PRAGMA user_version = {_SCHEMA}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._connection.close()

    def _identity(self) -> tuple[int, int]:
        """Which file lies at the path: device and inode.

        Raises:
            HostError: PF913, none.
        """
        try:
            found = self.path.stat()
        except FileNotFoundError:
            raise self._replaced() from None
        except OSError as error:
            raise files.disk_error(error, self.path) from error
        return found.st_dev, found.st_ino

    def _replaced(self) -> HostError:
        remedy = "stop `pathfed-site start` first; then put the record back, or begin a new one with an empty file of this name"
        what = "the egress record was removed or replaced while the site runs: nothing leaves"
        return HostError(ErrorCode.EGRESS_RECORD_DAMAGED, what, where=self.path, remedy=remedy)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # A commit that a full disk refuses leaves the transaction open, and every later one would be refused with it.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, error: sqlite3.Error) -> HostError:
        text = str(error)
        if "malformed" in text or "not a database" in text or "no such table" in text or isinstance(error, sqlite3.IntegrityError):
            return damaged(f"it cannot be read or added to: {text}", self.path)
        if "full" in text:
            return HostError(ErrorCode.DISK_FULL, "the disk is full: nothing leaves this site until it is not", where=self.path)
        return HostError(ErrorCode.HOME_UNUSABLE, f"the egress record cannot be used: {text}", where=self.path)

    def append(self, *sent: Outgoing) -> None:
        """Store entries, all or none, in this order; on the disk when this returns.

        Raises:
            HostError: PF913, the file was removed or replaced since it was opened; and see above.
        """
        if self._identity() != self._file:
            raise self._replaced()
        with self._errors(), self._transaction():
            last = self._connection.execute("SELECT sequence, entry FROM egress ORDER BY sequence DESC LIMIT 1").fetchone()
            sequence, previous = (0, None) if last is None else (last[0], digest.of_bytes(last[1]))
            for one in sent:
                sequence += 1
                entry = EgressEntry(sequence=sequence, previous=previous, at=self._now(), sent=one)
                data = entry.to_bytes()
                self._connection.execute("INSERT INTO egress VALUES (?, ?, ?, ?, ?, ?)", (*_columns(entry), data))
                previous = digest.of_bytes(data)

    def left_before(self, kind: EgressKind, run: str, round_index: int) -> bool:
        """Whether an entry of this kind is there for this round."""
        asked = "SELECT 1 FROM egress WHERE run = ? AND round_index = ? AND kind = ? LIMIT 1"
        with self._errors():
            return self._connection.execute(asked, (run, round_index, kind.value)).fetchone() is not None

    def entries(self, since: float | None = None) -> Iterator[EgressEntry]:
        """Entries from a time (UTC seconds) on, or all, in order, one by one: not held in memory, and not compared with each other.

        Raises:
            HostError: PF913, one cannot be read.
        """
        with (
            self._errors(),
            closing(
                self._connection.execute("SELECT sequence, entry FROM egress WHERE at >= ? ORDER BY sequence", (since or 0.0,))
            ) as rows,
        ):
            for sequence, data in rows:
                yield self._entry(sequence, data)

    def _entry(self, sequence: int, data: bytes) -> EgressEntry:
        try:
            return EgressEntry.from_bytes(data)
        except (ValueError, TypeError) as error:
            raise damaged(f"an entry was changed: {error}", f"{self.path}, entry {sequence}") from None

    def verified(self, *, noted: Digest | None = None) -> EgressHead:
        """Check every entry, the chain and the columns beside it.

        Args:
            noted: a head that was seen before, and must still be in the chain.

        Raises:
            HostError: PF913, something was changed, dropped, swapped or added; PF914, `noted` is not in the chain.
        """
        previous: Digest | None = None
        count, seen = 0, noted is None
        with self._errors(), closing(self._connection.execute("SELECT * FROM egress ORDER BY sequence")) as rows:
            for *columns, data in rows:
                count += 1
                entry = self._entry(columns[0], data)
                if (entry.sequence, entry.previous, _columns(entry)) != (count, previous, tuple(columns)):
                    raise damaged("an entry does not follow from the one before it", f"{self.path}, entry {count}")
                previous = digest.of_bytes(data)
                seen = seen or previous == noted
        if not seen:
            remedy = "an end was cut off, or another record was put in its place: keep the file, and ask who had access to this machine"
            what = "the noted head is not in the egress record"
            raise HostError(ErrorCode.EGRESS_RECORD_BEHIND, what, where=self.path, value=noted, remedy=remedy)
        return EgressHead(count, previous)


def _columns(entry: EgressEntry) -> tuple[int, float, str, str | None, int | None]:
    return entry.sequence, entry.at, entry.sent.kind.value, entry.sent.run, entry.sent.round_index


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, for one transaction: `executescript` would commit before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def damaged(what: str, where: object) -> HostError:
    """The error of a record that does not verify."""
    remedy = "keep the file as evidence, find out what happened to it, and begin a new one with an empty file of this name"
    return HostError(ErrorCode.EGRESS_RECORD_DAMAGED, f"the egress record is damaged: {what}", where=where, remedy=remedy)
