"""Sites' words against plans: rejections and revocations.

Revision: 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "decision",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("plan", sa.String(length=71), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False, comment="a word against the plan; a revocation is for good"),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False, comment="of the envelope"),
        sa.Column("decided_at", sa.Double(), nullable=False, comment="by the site's clock"),
        sa.CheckConstraint("kind IN ('rejection', 'revocation')", name=op.f("ck_decision_kind")),
        sa.ForeignKeyConstraint(["plan"], ["plan.digest"], name="fk_decision_plan"),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_decision_site"),
        sa.PrimaryKeyConstraint("seq", name="pk_decision"),
        sa.UniqueConstraint("digest", name="uq_decision_digest"),
    )
    if op.get_bind().dialect.name == "postgresql":
        _guard_postgresql()
    else:
        _guard_sqlite()


def _guard_postgresql() -> None:
    op.execute("CREATE TRIGGER decision_rows_stay BEFORE UPDATE OR DELETE ON decision FOR EACH ROW EXECUTE FUNCTION refuse_change()")
    op.execute("CREATE TRIGGER decision_stays BEFORE TRUNCATE ON decision FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()")


def _guard_sqlite() -> None:
    refuse = "BEGIN SELECT RAISE(ABORT, 'decision is append-only'); END"
    for verb in ("UPDATE", "DELETE"):
        op.execute(f"CREATE TRIGGER decision_no_{verb.lower()} BEFORE {verb} ON decision {refuse}")
    # INSERT OR REPLACE deletes the old row without its delete trigger.
    there = "EXISTS (SELECT 1 FROM decision WHERE seq = NEW.seq OR digest = NEW.digest)"
    op.execute(f"CREATE TRIGGER decision_no_replace BEFORE INSERT ON decision WHEN {there} {refuse}")
