"""The transparency log in the server database. Entries are only ever added, and always in the transaction of what they tell of.

Order and concurrency: one writer at a time takes the next indices and holds them until its transaction ends, so the log has no gap and
readers always see all leaves up to some size. On SQLite the transaction's own lock does that; on PostgreSQL an advisory lock. Whoever
appends does so *last* in the transaction: nothing else may be waited for while the lock is held.
"""

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection, func, insert, select, text

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName
from pathfed_common.provenance.log_leaves import AnyLeaf, KeyRotated, Released, SiteAdmitted, SiteRevoked, read_leaf
from pathfed_common.provenance.log_quorum import Roll
from pathfed_server.db.audit_store import AuditStore, add_event
from pathfed_server.db.schema import cosignature, log_checkpoint, log_entry, release
from pathfed_server.provenance.log_ports import Cosignature
from pathfed_server.provenance.log_tree import MEMBERSHIP

_LOG_LOCK = 0x706C6F67  # "plog": one writer of the log at a time on PostgreSQL


class LogStore(AuditStore):
    """Implements `provenance.log_ports.LogRecords`."""

    def log_size(self) -> int:
        """See `LogRecords`."""
        with self._read() as connection:
            return _size(connection)

    def log_leaves(self, start: int, stop: int) -> list[bytes]:
        """See `LogRecords`."""
        query = select(log_entry.c.leaf).where(log_entry.c.leaf_index >= start, log_entry.c.leaf_index < stop)
        with self._read() as connection:
            return [bytes(leaf) for leaf in connection.execute(query.order_by(log_entry.c.leaf_index)).scalars()]

    def log_index(self, leaf_hash: bytes) -> int | None:
        """See `LogRecords`."""
        with self._read() as connection:
            return connection.execute(select(log_entry.c.leaf_index).where(log_entry.c.leaf_hash == leaf_hash)).scalar()

    def newest_checkpoint(self) -> bytes | None:
        """See `LogRecords`."""
        query = select(log_checkpoint.c.note).order_by(log_checkpoint.c.size.desc()).limit(1)
        with self._read() as connection:
            return connection.execute(query).scalar()

    def log_checkpoint(self, size: int) -> bytes | None:
        """See `LogRecords`."""
        with self._read() as connection:
            return connection.execute(select(log_checkpoint.c.note).where(log_checkpoint.c.size == size)).scalar()

    def add_checkpoint(self, size: int, note: bytes) -> None:
        """See `LogRecords`."""
        with self._write() as connection:
            _lock_table(connection, "log_checkpoint")
            if connection.execute(select(log_checkpoint.c.size).where(log_checkpoint.c.size == size)).scalar() is None:
                connection.execute(insert(log_checkpoint).values(size=size, note=note))

    def cosignatures(self, size: int) -> list[Cosignature]:
        """See `LogRecords`."""
        query = select(cosignature).where(cosignature.c.size <= size)
        with self._read() as connection:
            rows = connection.execute(query).mappings().all()
        return sorted((Cosignature(**row) for row in rows), key=lambda row: (row.size, row.site))

    def add_cosignature(self, given: Cosignature) -> None:
        """See `LogRecords`."""
        there = select(cosignature.c.size).where(cosignature.c.size == given.size, cosignature.c.site == given.site)
        with self._write() as connection:
            _lock_table(connection, "cosignature")
            if connection.execute(there).scalar() is None:
                connection.execute(insert(cosignature).values(vars(given)))

    def add_release(self, name: Digest, *, run: RunName, at: float, by: str = "operator") -> None:
        """Note that a run's encoder was released, in the log too. The same release again changes nothing.

        Args:
            name: digest of the release's manifest.
            run: the run.
            at: UTC seconds.
            by: who released it, for the audit trail.
        """
        with self._write() as connection:
            _lock_table(connection, "release")
            if connection.execute(select(release.c.digest).where(release.c.digest == name)).scalar() is not None:
                return
            connection.execute(insert(release).values(digest=name, run=run, released_at=at))
            add_event(connection, actor=by, action="run.released", subject=run, at=at, detail={"release": name})
            append_leaves(connection, [Released(run=run, release=name)])

    def releases(self) -> list[tuple[Digest, RunName, float]]:
        """Every release: digest of its manifest, run, UTC seconds; the oldest first."""
        query = select(release.c.digest, release.c.run, release.c.released_at).order_by(release.c.released_at, release.c.digest)
        with self._read() as connection:
            return [(Digest(name), RunName(run), at) for name, run, at in connection.execute(query)]


def append_leaves(connection: Connection, leaves: Sequence[AnyLeaf]) -> int:
    """Append leaves in the caller's transaction, as its last statement but for audit events.

    Returns:
        The log's size with them.

    Raises:
        ProvenanceError: PF601, an admission, revocation or rotation that cannot follow, such as one that names a key which the log has
            named before; PF602, a rotation that both keys did not sign. The caller's transaction must then not be committed.
    """
    _lock(connection)
    size = _size(connection)
    roll = _roll(connection) if any(leaf.kind in MEMBERSHIP for leaf in leaves) else Roll()
    rows = []
    for index, leaf in enumerate(leaves, start=size):
        if isinstance(leaf, SiteAdmitted | SiteRevoked | KeyRotated):
            roll = replace(roll, size=index).after(leaf)
        rows.append({"leaf_index": index, "kind": leaf.kind, "leaf": leaf.to_bytes(), "leaf_hash": leaf.hash})
    if rows:
        connection.execute(insert(log_entry), rows)
    return size + len(rows)


def _lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOG_LOCK})


def _lock_table(connection: Connection, table: str) -> None:
    """On PostgreSQL, let one writer of the table at a time look and then insert. The log's own lock would not do: rows refer to others."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")


def _size(connection: Connection) -> int:
    newest = connection.execute(select(func.max(log_entry.c.leaf_index))).scalar()
    return 0 if newest is None else int(newest) + 1


def _roll(connection: Connection) -> Roll:
    """Who is and was enrolled, from the leaves that say so."""
    query = select(log_entry.c.leaf_index, log_entry.c.leaf).where(log_entry.c.kind.in_(MEMBERSHIP)).order_by(log_entry.c.leaf_index)
    roll = Roll()
    for index, leaf in connection.execute(query):
        roll = replace(roll, size=index).after(read_leaf(bytes(leaf), where=f"log, leaf {index}"))
    return roll
