"""The transparency log: its entries, checkpoints and cosignatures, and releases. What was recorded before gets its leaves.

Revision: 0002, after 0001.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

#: Append-only tables, each with the condition under which a new row NEW would replace one that is there.
_APPEND_ONLY = {
    "cosignature": "size = NEW.size AND site = NEW.site",
    "log_checkpoint": "size = NEW.size",
    "log_entry": "leaf_index = NEW.leaf_index OR leaf_hash = NEW.leaf_hash",
    "release": "digest = NEW.digest",
}
_NOT_NEXT = "NEW.leaf_index <> (SELECT COALESCE(MAX(leaf_index) + 1, 0) FROM log_entry)"
#: (UTC seconds, rank among what happened at once, the leaf)
_Dated = tuple[float, int, dict[str, Any]]


def upgrade() -> None:
    """Apply."""
    _tables()
    _backfill()
    if op.get_bind().dialect.name == "postgresql":
        _guard_postgresql()
    else:
        _guard_sqlite()


def _tables() -> None:
    op.create_table(
        "log_entry",
        sa.Column("leaf_index", sa.BigInteger(), autoincrement=False, nullable=False, comment="from 0, without gaps"),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("leaf", sa.LargeBinary(), nullable=False, comment="the leaf's canonical bytes"),
        sa.Column("leaf_hash", sa.LargeBinary(), nullable=False, comment="RFC 9162 leaf hash, 32 bytes"),
        sa.CheckConstraint("leaf_index >= 0", name=op.f("ck_log_entry_leaf_index")),
        sa.PrimaryKeyConstraint("leaf_index", name="pk_log_entry"),
        sa.UniqueConstraint("leaf_hash", name="uq_log_entry_leaf_hash"),
    )
    op.create_table(
        "log_checkpoint",
        sa.Column("size", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("note", sa.LargeBinary(), nullable=False, comment="C2SP signed note with the log's signature alone"),
        sa.CheckConstraint("size >= 1", name=op.f("ck_log_checkpoint_size")),
        sa.PrimaryKeyConstraint("size", name="pk_log_checkpoint"),
    )
    op.create_table(
        "cosignature",
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("line", sa.LargeBinary(), nullable=False, comment="the note's signature line, without newline"),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_cosignature_site"),
        sa.ForeignKeyConstraint(["size"], ["log_checkpoint.size"], name="fk_cosignature_size"),
        sa.PrimaryKeyConstraint("size", "site", name="pk_cosignature"),
    )
    op.create_table(
        "release",
        sa.Column("digest", sa.String(length=71), nullable=False, comment="of the release's manifest"),
        sa.Column("run", sa.String(length=63), nullable=False),
        sa.Column("released_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["run.name"], name="fk_release_run"),
        sa.PrimaryKeyConstraint("digest", name="pk_release"),
    )


def _backfill() -> None:
    """A leaf for everything that the log would hold had it been there, in order of the server's times."""
    entry = sa.table(
        "log_entry",
        sa.column("leaf_index", sa.BigInteger),
        sa.column("kind", sa.String),
        sa.column("leaf", sa.LargeBinary),
        sa.column("leaf_hash", sa.LargeBinary),
    )
    rows = []
    for index, (_, _, plain) in enumerate(sorted(_recorded(), key=lambda dated: dated[:2])):
        leaf = json.dumps({"version": 1, **plain}, sort_keys=True, separators=(",", ":")).encode("ascii")
        leaf_hash = hashlib.sha256(b"\x00" + leaf).digest()
        rows.append({"leaf_index": index, "kind": plain["kind"], "leaf": leaf, "leaf_hash": leaf_hash})
    op.bulk_insert(entry, rows)


def _recorded() -> Iterator[_Dated]:
    for name, key, enrolled_at, revoked_at in _rows("SELECT name, evidence_key, enrolled_at, revoked_at FROM site ORDER BY name"):
        yield enrolled_at, 0, {"kind": "site-admitted", "site": name, "evidence_key": key, "at": enrolled_at}
        if revoked_at is not None:
            yield revoked_at, 1, {"kind": "site-revoked", "site": name, "at": revoked_at}
    for plan, at in _rows("SELECT digest, published_at FROM plan ORDER BY digest"):
        yield at, 2, {"kind": "plan-published", "plan": plan}
    approvals = "SELECT a.site, a.plan, a.envelope, a.approved_at, p.published_at FROM approval a JOIN plan p ON p.digest = a.plan"
    for site, plan, envelope, approved_at, published_at in _rows(f"{approvals} ORDER BY a.site, a.plan"):
        # The site's clock may be behind the server's.
        leaf = {"kind": "plan-approved", "site": site, "plan": plan, "approval": "sha256:" + hashlib.sha256(envelope).hexdigest()}
        yield max(approved_at, published_at), 3, leaf
    statements = "SELECT s.run, s.round_index, s.site, s.digest, c.committed_at FROM update_statement s JOIN checkpoint c"
    on = "ON c.run = s.run AND c.round_index = s.round_index ORDER BY s.run, s.round_index, s.site"
    for run, index, site, name, at in _rows(f"{statements} {on}"):
        yield at, 4, {"kind": "statement", "run": run, "round_index": index, "site": site, "statement": name}
    for run, index, state, at in _rows("SELECT run, round_index, state, committed_at FROM checkpoint ORDER BY run, round_index"):
        yield at, 5, {"kind": "encoder-committed", "run": run, "round_index": index, "state": state}


def _rows(query: str) -> list[Any]:
    return list(op.get_bind().execute(sa.text(query)).all())


def _guard_postgresql() -> None:
    for table in _APPEND_ONLY:
        op.execute(f"CREATE TRIGGER {table}_rows_stay BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_change()")
        op.execute(f"CREATE TRIGGER {table}_stays BEFORE TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()")
    op.execute(
        "CREATE FUNCTION refuse_gap() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN IF {_NOT_NEXT} THEN RAISE EXCEPTION 'log_entry is append-only, from 0 without gaps'; END IF; RETURN NEW; END $$"
    )
    op.execute("CREATE TRIGGER log_entry_next BEFORE INSERT ON log_entry FOR EACH ROW EXECUTE FUNCTION refuse_gap()")


def _guard_sqlite() -> None:
    for table, same in _APPEND_ONLY.items():
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        # INSERT OR REPLACE deletes the old row without its delete trigger.
        there = f"EXISTS (SELECT 1 FROM {table} WHERE {same})"  # noqa: S608 (constants of this file)
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {there} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )
    refuse = "BEGIN SELECT RAISE(ABORT, 'log_entry is append-only, from 0 without gaps'); END"
    op.execute(f"CREATE TRIGGER log_entry_next BEFORE INSERT ON log_entry WHEN {_NOT_NEXT} {refuse}")
