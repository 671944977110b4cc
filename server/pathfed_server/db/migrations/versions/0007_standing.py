"""Suspended sites, sites that left a run, and updates released from quarantine.

Revision: 0007, after 0006.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("site", sa.Column("suspended_at", sa.Double(), nullable=True, comment="null: not suspended"))
    since = "from when on refusals count towards a suspension; null: from the first"
    op.add_column("site", sa.Column("reinstated_at", sa.Double(), nullable=True, comment=since))
    op.add_column("run_site", sa.Column("left_at", sa.Double(), nullable=True, comment="null: the site is in the run"))
    waived = "why it was refused before an operator released it; null: it was not"
    op.add_column("participation", sa.Column("released", sa.String(length=8), nullable=True, comment=waived))
    none = "null: not released, as in the columns below"
    op.add_column("quarantine", sa.Column("released_at", sa.Double(), nullable=True, comment=none))
    op.add_column("quarantine", sa.Column("released_by", sa.String(length=80), nullable=True))
    op.add_column("quarantine", sa.Column("release_reason", sa.Text(), nullable=True))
