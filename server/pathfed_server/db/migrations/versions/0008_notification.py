"""How far each receiver of notifications has been told.

Revision: 0008, after 0007.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "notification",
        sa.Column("receiver", sa.String(length=63), nullable=False),
        sa.Column("after", sa.BigInteger(), nullable=False, comment="events up to this number are done with"),
        sa.Column("until", sa.BigInteger(), comment="last event of the message under way; null: none is"),
        sa.Column("events", sa.Integer(), nullable=False, comment="that the message under way tells of"),
        sa.Column("began_at", sa.Double(), comment="null: no message is under way"),
        sa.Column("attempts", sa.Integer(), nullable=False, comment="at the message under way"),
        sa.Column("next_at", sa.Double(), comment="null: at once"),
        sa.Column("code", sa.String(length=8), comment="why the last attempt failed; null: it did not"),
        sa.Column("sent", sa.BigInteger(), nullable=False, comment="messages that arrived"),
        sa.Column("sent_at", sa.Double(), comment="null: none has arrived"),
        sa.Column("given_up", sa.BigInteger(), nullable=False, comment="messages given up"),
        sa.CheckConstraint("(until IS NULL) = (began_at IS NULL)", name=op.f("ck_notification_under_way")),
        sa.PrimaryKeyConstraint("receiver", name="pk_notification"),
    )
