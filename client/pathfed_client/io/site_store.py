"""The site's database: slides, withdrawals, plans, sealed updates, the privacy ledger's entries and a log book, in one SQLite file.

The only module of the client that imports a database library, with `plan_tables`, which is a part of it. Guarantees:

- every method is one transaction: done whole and flushed to the disk when it returns (`synchronous=FULL`), or not at all; inside
  `together` several methods are one;
- ledger entries are append-only and gapless, and withdrawals are for good, enforced by triggers inside the database;
- several processes of a site may use it at once (WAL, writers wait up to `BUSY_TIMEOUT_S` for each other);
- the file is readable by its owner alone: it holds slide names.
"""

import json
import shutil
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from pathfed_client.cohort.cohort import Cohort, Pseudonym, SlideId
from pathfed_client.cohort.withdrawal import Withdrawn, WithdrawnKind
from pathfed_client.io import plan_tables
from pathfed_client.io.site_records import (
    Event,
    SealedUpdate,
    SlideRecord,
    SlideStatus,
    WithdrawnMeanwhileError,
)
from pathfed_client.io.tile_index import IndexEntry
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, PathfedError, PrivacyError, ProvenanceError, TransportError
from pathfed_common.provenance import dsse

#: 1: the first. 2: plans as they are received, approvers and their signatures.
SCHEMA_VERSION = 2
BUSY_TIMEOUT_S = 60
_AT_ONCE = 500  # numbers in one question: SQLite bounds its parameters
#: Below this, bytes, a disk counts as full: SQLite's shared-memory file alone takes half of it.
_LEAST_FREE = 64 * 1024

_META = sa.MetaData()

_VERSION = sa.Table("schema_version", _META, sa.Column("version", sa.Integer, primary_key=True))

_SLIDE = sa.Table(
    "slide",
    _META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("scan_key", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("mtime_ns", sa.Integer, nullable=False),
    sa.Column("parts", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("detail", sa.Text),
    sa.Column("patient", sa.Text),
    sa.Column("mpp", sa.Float),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("tile_count", sa.Integer, nullable=False),
    sa.Column("index_offset", sa.Integer),
    sa.Column("index_size", sa.Integer),
    sa.Column("index_check", sa.Text),
    sa.Column("attributes", sa.Text, nullable=False),
    sa.UniqueConstraint("path", "scan_key"),
    sa.CheckConstraint("status <> 'usable' OR (patient IS NOT NULL AND tile_count > 0 AND index_check IS NOT NULL)"),
    sa.Index("slide_cohort", "scan_key", "status", "patient"),
    sqlite_autoincrement=True,
)

_WITHDRAWAL = sa.Table(
    "withdrawal",
    _META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.UniqueConstraint("kind", "name"),
    sqlite_autoincrement=True,
)

_SEALED = sa.Table(
    "sealed_update",
    _META,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("round_index", sa.Integer, primary_key=True),
    sa.Column("statement", sa.LargeBinary, nullable=False),
    sa.Column("update_path", sa.Text, nullable=False),
    sa.Column("update", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

_LEDGER = sa.Table(
    "ledger_entry",
    _META,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("entry", sa.LargeBinary, nullable=False),
)

_EVENT = sa.Table(
    "event",
    _META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("code", sa.Text),
    sa.Column("detail", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)

# The insert trigger also stops INSERT OR REPLACE, which deletes without firing the delete trigger.
_TRIGGERS = (
    "CREATE TRIGGER ledger_entry_no_update BEFORE UPDATE ON ledger_entry BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER ledger_entry_no_delete BEFORE DELETE ON ledger_entry BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER ledger_entry_gapless BEFORE INSERT ON ledger_entry"
    " WHEN EXISTS (SELECT 1 FROM ledger_entry) AND NEW.sequence <> (SELECT max(sequence) + 1 FROM ledger_entry)"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is gapless'); END",
    "CREATE TRIGGER withdrawal_no_update BEFORE UPDATE ON withdrawal BEGIN SELECT RAISE(ABORT, 'a withdrawal is for good'); END",
    "CREATE TRIGGER withdrawal_no_delete BEFORE DELETE ON withdrawal BEGIN SELECT RAISE(ABORT, 'a withdrawal is for good'); END",
)


class SiteStore(plan_tables.PlanTables):
    """One site's database. Usable as a context manager; `close` gives its connections back.

    Implements the ledger's storage port (`entries`, `append`) and gives the heads its sealed statements name (`stated_heads`).

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
        self._stated: dict[Digest, Digest] = {}
        sa.event.listen(self._engine, "connect", _on_connect)
        sa.event.listen(self._engine, "begin", _on_begin)
        try:
            self._prepare()
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

    def _prepare(self) -> None:
        with self._transaction() as connection:
            if sa.inspect(connection).has_table(_VERSION.name):
                found = connection.execute(sa.select(_VERSION.c.version)).scalar_one()
                if found > SCHEMA_VERSION:
                    raise HostError(
                        ErrorCode.SETTINGS_INVALID,
                        "the site database was made by a newer pathfed",
                        where=self.path,
                        value=f"schema {found}, this version knows {SCHEMA_VERSION}",
                        remedy="install that pathfed version again",
                    )
                if found == SCHEMA_VERSION:
                    return
            # So far later versions have only added tables and triggers: making those that are not there is the whole upgrade.
            _META.create_all(connection)
            plan_tables.META.create_all(connection)
            for trigger in (*_TRIGGERS, *plan_tables.triggers()):
                connection.exec_driver_sql(trigger.replace("CREATE TRIGGER", "CREATE TRIGGER IF NOT EXISTS", 1))
            connection.execute(sa.delete(_VERSION))
            connection.execute(sa.insert(_VERSION).values(version=SCHEMA_VERSION))

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

    # Slides

    def upsert_slide(self, record: SlideRecord) -> SlideId:
        """Store a slide under its path and scan key, replacing what was there.

        A number names content and the tiles found in it: a file whose bytes, size, time or resolution changed gets a new number, and
        numbers are never used again, so that a cohort's digest changes with its slides. A slide that was not read yet keeps the number it
        was given when it was found.

        Args:
            record: the slide; its tile map is on the disk already.

        Returns:
            The slide's number.

        Raises:
            ValueError: it has tiles without a tile map, or the reverse.
        """
        if (record.tile_count > 0) != (record.tiles is not None):
            raise ValueError(f"a slide with {record.tile_count} tiles and tile map {record.tiles}")
        values = _slide_values(record)
        same_place = (_SLIDE.c.path == record.path) & (_SLIDE.c.scan_key == record.scan_key)
        same_file = (
            same_place
            & _SLIDE.c.fingerprint.in_([record.fingerprint, ""])  # empty: not read yet, and none other than this
            & (_SLIDE.c.size == record.size)
            & (_SLIDE.c.mtime_ns == record.mtime_ns)
            & (_SLIDE.c.mpp.is_(None) | _SLIDE.c.mpp.is_not_distinct_from(record.mpp))
        )
        with self._transaction() as connection:
            connection.execute(sa.delete(_SLIDE).where(same_place & ~same_file))
            statement = sqlite_insert(_SLIDE).values(**values)
            statement = statement.on_conflict_do_update(index_elements=["path", "scan_key"], set_=values)
            return SlideId(connection.execute(statement.returning(_SLIDE.c.id)).scalar_one())

    def set_slide_state(
        self,
        slide: SlideId,
        *,
        status: SlideStatus,
        reason: ErrorCode | None = None,
        detail: str | None = None,
        patient: Pseudonym | None = None,
    ) -> None:
        """Change who a slide belongs to and whether it counts, without reading it again; its tiles stay.

        Raises:
            KeyError: there is no such slide.
        """
        values = {"status": status.value, "reason": None if reason is None else reason.value, "detail": detail, "patient": patient}
        with self._transaction() as connection:
            changed = connection.execute(sa.update(_SLIDE).where(_SLIDE.c.id == slide).values(**values)).rowcount
        if not changed:
            raise KeyError(f"no slide {slide}")

    def add_slides(self, records: Sequence[SlideRecord]) -> dict[str, SlideId]:
        """Slides that were not known and have no tiles yet; numbers by path, ascending in this order. Quick for very many."""
        if not records:
            return {}
        values = [_slide_values(record) for record in records]
        with self._transaction() as connection:
            last = connection.execute(sa.select(sa.func.coalesce(sa.func.max(_SLIDE.c.id), 0))).scalar_one()
            connection.execute(sa.insert(_SLIDE), values)
            return {
                row.path: SlideId(row.id) for row in connection.execute(sa.select(_SLIDE.c.id, _SLIDE.c.path).where(_SLIDE.c.id > last))
            }

    def restate_slides(self, records: Mapping[SlideId, SlideRecord]) -> None:
        """As `set_slide_state`, of many slides at once, and what the list says of them; of each record only these fields count."""
        fields = ("status", "reason", "detail", "patient", "attributes")
        self._update(fields, [{"number": number} | _slide_values(record) for number, record in records.items()])

    def move_slides(self, moved: Mapping[SlideId, SlideRecord]) -> None:
        """Slides that lie elsewhere now: path, parts and time change, numbers and tiles stay. Paths may be exchanged among them."""
        with self.together():
            self._update(("path",), [{"number": number, "path": f"/{number}"} for number in moved])  # no slide's name begins so
            self._update(("path", "parts", "mtime_ns"), [{"number": number} | _slide_values(record) for number, record in moved.items()])

    def forget_slides(self, slides: Collection[SlideId]) -> None:
        """Take out slides; their numbers are not used again."""
        if slides:
            with self._transaction() as connection:
                connection.execute(sa.delete(_SLIDE).where(_SLIDE.c.id == sa.bindparam("number")), [{"number": one} for one in slides])

    def set_attempts(self, attempts: Mapping[SlideId, int]) -> None:
        """Note how often reading these slides was begun without coming to an end."""
        self._update(("attempts",), [{"number": number, "attempts": count} for number, count in attempts.items()])

    def _update(self, fields: Sequence[str], values: Sequence[Mapping[str, Any]]) -> None:
        """Set these columns of many slides, each by its number."""
        if values:
            statement = sa.update(_SLIDE).where(_SLIDE.c.id == sa.bindparam("number"))
            statement = statement.values({name: sa.bindparam(f"new_{name}") for name in fields})
            with self._transaction() as connection:
                connection.execute(statement, [{"number": one["number"]} | {f"new_{name}": one[name] for name in fields} for one in values])

    def slides_of(self, numbers: Collection[SlideId]) -> dict[SlideId, SlideRecord]:
        """Slides by their numbers; those that are no more are left out."""
        found: dict[SlideId, SlideRecord] = {}
        wanted = sorted(numbers)
        with self._transaction(write=False) as connection:
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                rows = connection.execute(sa.select(_SLIDE).where(_SLIDE.c.id.in_(some)))
                found |= {SlideId(row.id): _slide_record(row) for row in rows}
        return found

    def slides(self, scan_key: Digest) -> dict[SlideId, SlideRecord]:
        """All slides scanned under these rules, in order of their paths."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(_SLIDE).where(_SLIDE.c.scan_key == scan_key).order_by(_SLIDE.c.path)).all()
        return {SlideId(row.id): _slide_record(row) for row in rows}

    def all_slides(self) -> list[SlideRecord]:
        """All slides under any rules; a slide that was scanned under several comes several times."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(_SLIDE).order_by(_SLIDE.c.path, _SLIDE.c.id)).all()
        return [_slide_record(row) for row in rows]

    def cohort(self, scan_key: Digest, weigh: Callable[[SlideRecord], float | None] = lambda _: 1.0) -> Cohort:
        """The patients these rules leave, each with the tiles of all that patient's usable slides. Empty before a scan.

        What a plan makes of them besides (`io.site_cohort`) comes in by `weigh`.

        Args:
            scan_key: the rules that the slides were scanned under.
            weigh: gives the weight of a usable slide's tiles, or None to leave it out.
        """
        query = (
            sa.select(_SLIDE)
            .where((_SLIDE.c.scan_key == scan_key) & (_SLIDE.c.status == SlideStatus.USABLE.value))
            .order_by(_SLIDE.c.patient, _SLIDE.c.id)
        )
        with self._transaction(write=False) as connection:
            return Cohort.of_rows(_weighed(connection.execute(query), weigh))

    # Withdrawals

    def withdraw(self, names: Collection[Withdrawn], event: Event) -> int:
        """Record withdrawals, take the patients' slides out and note it in the log book: at once and together.

        Slides withdrawn by path or contents are found by those who make a cohort (`io.site_cohort`), which have the key of the names.

        Returns:
            How many names are new.
        """
        values = [{"kind": one.kind.value, "name": one.name, "at": event.at} for one in sorted(names, key=lambda one: (one.kind, one.name))]
        patients = [{"withdrawn": one.name} for one in names if one.kind is WithdrawnKind.PATIENT]
        out = {"status": SlideStatus.REFUSED.value, "reason": ErrorCode.SLIDE_WITHDRAWN.value, "detail": "withdrawn"}
        of_patient = (_SLIDE.c.patient == sa.bindparam("withdrawn")) & (_SLIDE.c.status != SlideStatus.MISSING.value)
        with self._transaction() as connection:
            before = connection.execute(_WITHDRAWAL_COUNT).scalar_one()
            if values:
                connection.execute(sqlite_insert(_WITHDRAWAL).on_conflict_do_nothing(), values)
            if patients:
                connection.execute(sa.update(_SLIDE).where(of_patient).values(**out), patients)
            connection.execute(sa.insert(_EVENT).values(**_event_values(event)))
            new: int = connection.execute(_WITHDRAWAL_COUNT).scalar_one() - before
        return new

    def withdrawn(self) -> frozenset[Withdrawn]:
        """All names that were ever withdrawn. They are never taken back, so their number says whether something was added."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(_WITHDRAWAL.c.kind, _WITHDRAWAL.c.name)).all()
        return frozenset(Withdrawn(WithdrawnKind(row.kind), row.name) for row in rows)

    # The ledger's storage port

    def entries(self) -> list[bytes]:
        """All ledger entries in order of their sequence numbers.

        Raises:
            PrivacyError: PF304, the database file is torn or damaged.
        """
        try:
            with self._transaction(write=False) as connection:
                return list(connection.execute(sa.select(_LEDGER.c.entry).order_by(_LEDGER.c.sequence)).scalars())
        except HostError as error:
            if not _file_is_damaged(error.__cause__):
                raise
            remedy = "do not train at this site, restore no older copy, keep the file as evidence, and find out what happened to the disk"
            raise PrivacyError(
                ErrorCode.LEDGER_DAMAGED, "the ledger cannot be read: the site database is damaged", where=self.path, remedy=remedy
            ) from error

    def append(self, sequence: int, entry: bytes) -> None:
        """Add one ledger entry; on the disk when this returns.

        Raises:
            PrivacyError: the number is taken or leaves a gap (PF304): another process appended, or the ledger was tampered with.
        """
        try:
            with self._transaction() as connection:
                connection.execute(sa.insert(_LEDGER).values(sequence=sequence, entry=entry))
        except HostError as error:
            if not isinstance(error.__cause__, sa.exc.IntegrityError):
                raise
            raise PrivacyError(
                ErrorCode.LEDGER_DAMAGED,
                "the ledger takes entries at its end only",
                where=self.path,
                value=f"sequence {sequence}",
                remedy="run one client per site home, then `pathfed-site ledger verify`",
            ) from error

    def stated_heads(self) -> list[Digest]:
        """The ledger's head that each sealed update's statement names, of all runs, in no order.

        Raises:
            ProvenanceError: PF601, PF602, a stored statement cannot be read.
        """
        with self._transaction(write=False) as connection:
            stored = connection.execute(sa.select(_SEALED.c.statement)).scalars().all()
        return [self._stated_head(envelope) for envelope in stored]

    def _stated_head(self, envelope: bytes) -> Digest:
        """Read once a process: there is a statement for every round ever, and they are asked for at every charge."""
        name = digest.of_bytes(envelope)
        if name not in self._stated:
            try:
                # Its one field: reading the whole statement takes three times as long.
                self._stated[name] = digest.parse(json.loads(dsse.parse(envelope).payload)["predicate"]["ledger_head"])
            except (ValueError, TypeError, KeyError) as error:
                what = f"a stored statement cannot be read: {error}"
                raise ProvenanceError(ErrorCode.RECORD_CHANGED, what, where=self.path) from None
        return self._stated[name]

    # Sealed updates

    def put_sealed(self, sealed: SealedUpdate, *, withdrawn: int | None = None) -> None:
        """Keep a finished round's answer. Storing the same answer twice changes nothing.

        Args:
            sealed: the answer.
            withdrawn: number of withdrawn names that its cohort knew of; None where the answer rests on no cohort.

        Raises:
            WithdrawnMeanwhileError: there are more by now; nothing is stored. Compared and stored in one transaction: a withdrawal comes
                before an answer, and then counts for it, or after it.
            TransportError: the round was already answered otherwise (PF409).
        """
        with self._transaction() as connection:
            found = connection.execute(_one_sealed(sealed.run, sealed.round_index)).one_or_none()
            if found is None and withdrawn is not None and connection.execute(_WITHDRAWAL_COUNT).scalar_one() != withdrawn:
                raise WithdrawnMeanwhileError
            if found is None:
                connection.execute(sa.insert(_SEALED).values(**asdict(sealed)))
            elif (found.statement, found.update) != (sealed.statement, sealed.update):
                raise TransportError(
                    ErrorCode.ROUND_OUT_OF_ORDER,
                    "this round was already answered with another update",
                    where=f"run {sealed.run}, round {sealed.round_index}",
                )

    def get_sealed(self, run: str, round_index: int) -> SealedUpdate | None:
        """The answer to a round, or None when it was not answered yet."""
        with self._transaction(write=False) as connection:
            row = connection.execute(_one_sealed(run, round_index)).one_or_none()
        return None if row is None else _sealed(row)

    def last_sealed(self, run: str) -> SealedUpdate | None:
        """The answer to the latest answered round of a run, or None."""
        query = sa.select(_SEALED).where(_SEALED.c.run == run).order_by(_SEALED.c.round_index.desc()).limit(1)
        with self._transaction(write=False) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _sealed(row)

    # Log book

    def add_event(self, event: Event) -> None:
        """Write one line into the site's log book."""
        with self._transaction() as connection:
            connection.execute(sa.insert(_EVENT).values(**_event_values(event)))

    def events(self, limit: int = 100) -> list[Event]:
        """The latest lines, oldest first."""
        with self._transaction(write=False) as connection:
            rows = connection.execute(sa.select(_EVENT).order_by(_EVENT.c.id.desc()).limit(limit)).all()
        return [
            Event(at=row.at, kind=row.kind, code=None if row.code is None else ErrorCode(row.code), detail=row.detail)
            for row in reversed(rows)
        ]


def _on_connect(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # BEGIN is ours (below): the driver would start its transactions too late
    for pragma in (f"busy_timeout = {BUSY_TIMEOUT_S * 1000}", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _on_begin(connection: sa.Connection) -> None:
    # A writer takes the lock at once: a read that later turns into a write may fail without waiting.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("pathfed_write", True) else "BEGIN")


def _file_is_damaged(error: BaseException | None) -> bool:
    return isinstance(error, sa.exc.DatabaseError) and any(word in str(error.orig) for word in ("malformed", "is not a database"))


def _host_error(error: sa.exc.DatabaseError, path: Path) -> PathfedError:
    text = str(error.orig)
    if _file_is_damaged(error):
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


_WITHDRAWAL_COUNT = sa.select(sa.func.count()).select_from(_WITHDRAWAL)


def _event_values(event: Event) -> dict[str, Any]:
    return asdict(event) | {"code": None if event.code is None else event.code.value}


def _attributes_text(attributes: Mapping[str, str]) -> str:
    return digest.canonical(dict(attributes)).decode()


def _slide_values(record: SlideRecord) -> dict[str, Any]:
    tiles = record.tiles
    values = {name: getattr(record, name) for name in record.__dataclass_fields__ if name != "tiles"}
    return values | {
        "attributes": _attributes_text(record.attributes),
        "parts": json.dumps(record.parts),
        "status": record.status.value,
        "reason": None if record.reason is None else record.reason.value,
        "index_offset": None if tiles is None else tiles.offset,
        "index_size": None if tiles is None else tiles.size,
        "index_check": None if tiles is None else tiles.check,
    }


def _slide_record(row: sa.Row[Any]) -> SlideRecord:
    return SlideRecord(
        path=row.path,
        fingerprint=row.fingerprint,
        size=row.size,
        mtime_ns=row.mtime_ns,
        scan_key=row.scan_key,
        parts=tuple(json.loads(row.parts)),
        attempts=row.attempts,
        status=SlideStatus(row.status),
        reason=None if row.reason is None else ErrorCode(row.reason),
        detail=row.detail,
        patient=row.patient,
        mpp=row.mpp,
        width=row.width,
        height=row.height,
        tile_count=row.tile_count,
        tiles=None if row.index_check is None else IndexEntry(row.index_offset, row.index_size, row.index_check),
        attributes=json.loads(row.attributes),
    )


def _weighed(rows: Iterable[sa.Row[Any]], weigh: Callable[[SlideRecord], float | None]) -> Iterator[tuple[str, int, int, str, float]]:
    """Rows of a cohort, see `Cohort.of_rows`; slides without a weight are left out."""
    for row in rows:
        weight = weigh(_slide_record(row))
        if weight is not None:
            yield row.patient, row.id, row.tile_count, row.index_check, weight


def _one_sealed(run: str, round_index: int) -> sa.Select[Any]:
    return sa.select(_SEALED).where((_SEALED.c.run == run) & (_SEALED.c.round_index == round_index))


def _sealed(row: sa.Row[Any]) -> SealedUpdate:
    return SealedUpdate(**row._mapping)
