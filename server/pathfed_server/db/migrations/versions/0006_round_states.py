"""Runs may pause and drain; rounds are training and admitted in between.

Revision: 0006, after 0005.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_STATES = {
    "run": (
        "'planned', 'running', 'finished', 'failed', 'stopped'",
        "'planned', 'running', 'pausing', 'paused', 'draining', 'finished', 'failed', 'stopped'",
    ),
    "round": (
        "'planned', 'offered', 'collecting', 'committed', 'failed'",
        "'planned', 'offered', 'training', 'collecting', 'admitted', 'committed', 'failed'",
    ),
}


def upgrade() -> None:
    """Apply."""
    if op.get_bind().dialect.name == "postgresql":
        for table, (_, now) in _STATES.items():
            op.drop_constraint(op.f(f"ck_{table}_state"), table, type_="check")
            op.create_check_constraint(op.f(f"ck_{table}_state"), table, f"state IN ({now})")
    else:
        _relax_sqlite()


def _relax_sqlite() -> None:
    """SQLite has no words to change a constraint; its manual says to write the table's definition anew where a check is only relaxed.

    See "Making Other Kinds Of Table Schema Changes", https://www.sqlite.org/lang_altertable.html. Rows, triggers and references stay.
    """
    connection = op.get_bind()
    version = int(connection.exec_driver_sql("PRAGMA schema_version").scalar() or 0)
    connection.exec_driver_sql("PRAGMA writable_schema=ON")
    for table, (before, now) in _STATES.items():
        replace = "UPDATE sqlite_master SET sql = replace(sql, :before, :now) WHERE type = 'table' AND name = :table"
        connection.execute(sa.text(replace), {"before": f"({before})", "now": f"({now})", "table": table})
    connection.exec_driver_sql(f"PRAGMA schema_version={version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema=OFF")
