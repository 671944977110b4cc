"""What the wire format's rounding added to an admitted update.

Revision: 0005, after 0004.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    comment = "bound on the L2 norm of what the wire format's rounding added to the update"
    op.add_column("participation", sa.Column("rounding", sa.Double(), nullable=True, comment=comment))
