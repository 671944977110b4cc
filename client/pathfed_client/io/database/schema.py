"""The tables of a site's database, version by version.

Each version adds tables and triggers to the one before, and never touches what is there: what an earlier pathfed wrote stays readable. A
new version is one more `SchemaStep` at the end of `STEPS`; what an existing table lacks goes into a table of its own.
"""

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from pathfed_common.errors import ErrorCode, HostError

META = sa.MetaData()

VERSION = sa.Table("schema_version", META, sa.Column("version", sa.Integer, primary_key=True))

SLIDE = sa.Table(
    "slide",
    META,
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

WITHDRAWAL = sa.Table(
    "withdrawal",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.UniqueConstraint("kind", "name"),
    sqlite_autoincrement=True,
)

APPROVAL = sa.Table(
    "approval",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("plan", sa.Text, nullable=False, index=True),
    sa.Column("signed_plan", sa.LargeBinary, nullable=False),
    sa.Column("signed_approval", sa.LargeBinary, nullable=False),
    sa.Column("declared_patients", sa.Integer, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)

SEALED = sa.Table(
    "sealed_update",
    META,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("round_index", sa.Integer, primary_key=True),
    sa.Column("statement", sa.LargeBinary, nullable=False),
    sa.Column("update_path", sa.Text, nullable=False),
    sa.Column("update", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

LEDGER = sa.Table(
    "ledger_entry",
    META,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("entry", sa.LargeBinary, nullable=False),
)

EVENT = sa.Table(
    "event",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("code", sa.Text),
    sa.Column("detail", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)

# The insert trigger also stops INSERT OR REPLACE, which deletes without firing the delete trigger.
_FIRST_TRIGGERS = (
    "CREATE TRIGGER ledger_entry_no_update BEFORE UPDATE ON ledger_entry BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER ledger_entry_no_delete BEFORE DELETE ON ledger_entry BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER ledger_entry_gapless BEFORE INSERT ON ledger_entry"
    " WHEN EXISTS (SELECT 1 FROM ledger_entry) AND NEW.sequence <> (SELECT max(sequence) + 1 FROM ledger_entry)"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is gapless'); END",
    "CREATE TRIGGER withdrawal_no_update BEFORE UPDATE ON withdrawal BEGIN SELECT RAISE(ABORT, 'a withdrawal is for good'); END",
    "CREATE TRIGGER withdrawal_no_delete BEFORE DELETE ON withdrawal BEGIN SELECT RAISE(ABORT, 'a withdrawal is for good'); END",
)


# Version 2: what the site and the server say to each other (`pathfed_client.agent`).

RECEIVED_PLAN = sa.Table(
    "received_plan",
    META,
    sa.Column("plan", sa.Text, primary_key=True),
    sa.Column("signed_plan", sa.LargeBinary, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

WORD = sa.Table(
    "word",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("envelope", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("leaf", sa.LargeBinary, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("taken_at", sa.Float),
    sa.Column("code", sa.Text),
    sqlite_autoincrement=True,
)

OWN_LEAF = sa.Table(
    "own_leaf",
    META,
    sa.Column("leaf", sa.LargeBinary, primary_key=True),
    sa.Column("promised_at", sa.Float),
    sa.Column("receipt", sa.LargeBinary),
    sa.Column("received_at", sa.Float),
)

ALARM = sa.Table(
    "alarm",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("code", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("evidence", sa.LargeBinary),
    sa.Column("ended_at", sa.Float),
    sqlite_autoincrement=True,
)

SERVER_FACT = sa.Table(
    "server_fact",
    META,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

_SECOND_TRIGGERS = (
    "CREATE TRIGGER word_same BEFORE UPDATE OF envelope, leaf, at ON word BEGIN SELECT RAISE(ABORT, 'a word is kept as given'); END",
    "CREATE TRIGGER word_no_delete BEFORE DELETE ON word BEGIN SELECT RAISE(ABORT, 'a word is kept as given'); END",
    "CREATE TRIGGER receipt_for_good BEFORE UPDATE ON own_leaf WHEN OLD.receipt IS NOT NULL"
    " BEGIN SELECT RAISE(ABORT, 'a receipt is for good'); END",
    "CREATE TRIGGER own_leaf_no_delete BEFORE DELETE ON own_leaf BEGIN SELECT RAISE(ABORT, 'a receipt is for good'); END",
    "CREATE TRIGGER alarm_no_delete BEFORE DELETE ON alarm BEGIN SELECT RAISE(ABORT, 'an alarm is for good'); END",
)

# Version 3: who may sign approvals, where a site wants two people.

APPROVER = sa.Table(
    "approver",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("removed_at", sa.Float),
    sa.Index("approver_name", "name", unique=True, sqlite_where=sa.text("removed_at IS NULL")),
    sa.Index("approver_key", "key", unique=True, sqlite_where=sa.text("removed_at IS NULL")),
    sqlite_autoincrement=True,
)

APPROVER_SIGNATURE = sa.Table(
    "approver_signature",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("plan", sa.Text, nullable=False, index=True),
    sa.Column("approver", sa.Text, nullable=False),
    sa.Column("envelope", sa.LargeBinary, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sqlite_autoincrement=True,
)

_THIRD_TRIGGERS = tuple(
    f"CREATE TRIGGER {table}_no_{what.lower()} BEFORE {what} ON {table} BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
    for table in ("approval", "approver_signature")
    for what in ("UPDATE", "DELETE")
)


@dataclass(frozen=True)
class SchemaStep:
    """What one version adds.

    Attributes:
        tables: new tables.
        triggers: statements that make triggers.
    """

    tables: tuple[sa.Table, ...]
    triggers: tuple[str, ...] = ()


#: The first is version 1.
STEPS = (
    SchemaStep((VERSION, SLIDE, WITHDRAWAL, APPROVAL, SEALED, LEDGER, EVENT), _FIRST_TRIGGERS),
    SchemaStep((RECEIVED_PLAN, WORD, OWN_LEAF, ALARM, SERVER_FACT), _SECOND_TRIGGERS),
    SchemaStep((APPROVER, APPROVER_SIGNATURE), _THIRD_TRIGGERS),
)


def prepare(connection: sa.Connection, path: Path) -> None:
    """Make or upgrade the database: all steps that are missing, in the connection's transaction.

    Raises:
        HostError: PF905, it was made by a newer pathfed.
    """
    found = 0
    if sa.inspect(connection).has_table(VERSION.name):
        found = connection.execute(sa.select(VERSION.c.version)).scalar_one()
    if found > len(STEPS):
        raise HostError(
            ErrorCode.SETTINGS_INVALID,
            "the site database was made by a newer pathfed",
            where=path,
            value=f"schema {found}, this version knows {len(STEPS)}",
            remedy="install that pathfed version again",
        )
    if found == len(STEPS):
        return
    for step in STEPS[found:]:
        META.create_all(connection, tables=step.tables)
        for trigger in step.triggers:
            connection.exec_driver_sql(trigger)
    connection.execute(sa.delete(VERSION))
    connection.execute(sa.insert(VERSION).values(version=len(STEPS)))
