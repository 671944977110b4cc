"""The first schema: sites, plans, approvals, runs, rounds, what came of them, and the audit trail.

Revision: 0001, the first.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

#: Append-only tables, each with the condition under which a new row NEW would replace one that is there.
_APPEND_ONLY = {
    "approval": "site = NEW.site AND plan = NEW.plan",
    "audit_event": "seq = NEW.seq",
    "update_statement": "digest = NEW.digest OR (run = NEW.run AND round_index = NEW.round_index AND site = NEW.site)",
}


def upgrade() -> None:
    """Apply."""
    _parties()
    _runs()
    _rounds()
    _evidence()
    if op.get_bind().dialect.name == "postgresql":
        _guard_postgresql()
    else:
        _guard_sqlite()


def _parties() -> None:
    op.create_table(
        "site",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("evidence_key", sa.String(length=80), nullable=False, comment="ed25519:<base64>"),
        sa.Column("flower_key", sa.Text(), nullable=False, comment="OpenSSH text of the Flower node key"),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("enrolled_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True, comment="null: not revoked"),
        sa.CheckConstraint("state IN ('enrolled', 'revoked')", name=op.f("ck_site_state")),
        sa.PrimaryKeyConstraint("name", name="pk_site"),
        sa.UniqueConstraint("evidence_key", name="uq_site_evidence_key"),
        sa.UniqueConstraint("flower_key", name="uq_site_flower_key"),
    )
    op.create_table(
        "plan",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("canonical", sa.LargeBinary(), nullable=False, comment="the plan's canonical bytes, which the digest names"),
        sa.Column("signed", sa.LargeBinary(), nullable=False, comment="DSSE envelope over them"),
        sa.Column("published_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_plan"),
    )
    op.create_table(
        "approval",
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("plan", sa.String(length=71), nullable=False),
        sa.Column("declared_patients", sa.BigInteger(), nullable=False),
        sa.Column("reply_slots", sa.Boolean(), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("approved_at", sa.Double(), nullable=False),
        sa.CheckConstraint("declared_patients >= 1", name=op.f("ck_approval_declared_patients")),
        sa.ForeignKeyConstraint(["plan"], ["plan.digest"], name="fk_approval_plan"),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_approval_site"),
        sa.PrimaryKeyConstraint("site", "plan", name="pk_approval"),
    )


def _runs() -> None:
    op.create_table(
        "run",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("plan", sa.String(length=71), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column(
            "failures", sa.Integer(), nullable=False, comment="failed attempts at the next round since it was last committed or reopened"
        ),
        sa.Column("planned_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True, comment="null: never taken up"),
        sa.Column("ended_at", sa.Double(), nullable=True, comment="null: not ended"),
        sa.Column("code", sa.String(length=8), nullable=True, comment="why the run failed; null: it did not"),
        sa.CheckConstraint("state IN ('planned', 'running', 'finished', 'failed', 'stopped')", name=op.f("ck_run_state")),
        sa.ForeignKeyConstraint(["plan"], ["plan.digest"], name="fk_run_plan"),
        sa.PrimaryKeyConstraint("name", name="pk_run"),
    )
    op.create_table(
        "run_site",
        sa.Column("run", sa.String(length=63), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["run.name"], name="fk_run_site_run"),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_run_site_site"),
        sa.PrimaryKeyConstraint("run", "site", name="pk_run_site"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("run", sa.String(length=63), nullable=False),
        sa.Column("round_index", sa.Integer(), nullable=False, comment="0: the initial state"),
        sa.Column("state", sa.String(length=71), nullable=False),
        sa.Column("state_path", sa.Text(), nullable=False, comment="relative to the server's home"),
        sa.Column("state_bytes", sa.BigInteger(), nullable=False),
        sa.Column("optimiser", sa.String(length=71), nullable=False),
        sa.Column("optimiser_path", sa.Text(), nullable=False, comment="relative to the server's home"),
        sa.Column("optimiser_bytes", sa.BigInteger(), nullable=False),
        sa.Column("committed_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["run.name"], name="fk_checkpoint_run"),
        sa.PrimaryKeyConstraint("run", "round_index", name="pk_checkpoint"),
    )


def _rounds() -> None:
    op.create_table(
        "round",
        sa.Column("run", sa.String(length=63), nullable=False),
        sa.Column("round_index", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="how often the round has been offered"),
        sa.Column("base_state", sa.String(length=71), nullable=False),
        sa.Column("next_state", sa.String(length=71), nullable=True, comment="null: not committed"),
        sa.Column("offered_at", sa.Double(), nullable=True, comment="null: planned only"),
        sa.Column("deadline", sa.Double(), nullable=True, comment="null: planned only"),
        sa.Column("committed_at", sa.Double(), nullable=True, comment="null: not committed"),
        sa.Column("code", sa.String(length=8), nullable=True, comment="why its last attempt failed; null: it did not"),
        sa.Column("exchange_s", sa.Double(), nullable=True, comment="this and the durations below: null until committed"),
        sa.Column("transfer_s", sa.Double(), nullable=True),
        sa.Column("admission_s", sa.Double(), nullable=True),
        sa.Column("aggregation_s", sa.Double(), nullable=True),
        sa.Column("step_s", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "state <> 'committed' OR (next_state IS NOT NULL AND committed_at IS NOT NULL)", name=op.f("ck_round_committed")
        ),
        sa.CheckConstraint("state IN ('planned', 'offered', 'collecting', 'committed', 'failed')", name=op.f("ck_round_state")),
        sa.CheckConstraint("round_index >= 1", name=op.f("ck_round_round_index")),
        sa.ForeignKeyConstraint(["run"], ["run.name"], name="fk_round_run"),
        sa.PrimaryKeyConstraint("run", "round_index", name="pk_round"),
    )
    op.create_table(
        "participation",
        sa.Column("run", sa.String(length=63), nullable=False),
        sa.Column("round_index", sa.Integer(), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("code", sa.String(length=8), nullable=True, comment="why refused, silent or excluded; null otherwise"),
        sa.Column("update_digest", sa.String(length=71), nullable=True, comment="null: no update came"),
        sa.Column("update_bytes", sa.BigInteger(), nullable=True, comment="null: no update came"),
        sa.Column("statement", sa.String(length=71), nullable=True, comment="digest of the envelope; null: not admitted"),
        sa.Column(
            "weight", sa.Double(), nullable=True, comment="share in the mean; null: the round is not committed, or the site is not in it"
        ),
        sa.Column("epsilon_plan", sa.Double(), nullable=True, comment="as the site states it; null: not admitted, as in the columns below"),
        sa.Column("epsilon_total", sa.Double(), nullable=True),
        sa.Column("loss_sum", sa.Double(), nullable=True),
        sa.Column("loss_sum_std", sa.Double(), nullable=True),
        sa.Column("patients", sa.Double(), nullable=True),
        sa.Column("patients_std", sa.Double(), nullable=True),
        sa.Column("reply_slot_s", sa.Double(), nullable=True, comment="null: no reply, or replies are not slotted"),
        sa.Column("offered_at", sa.Double(), nullable=True, comment="null: excluded"),
        sa.Column("received_at", sa.Double(), nullable=True, comment="null: no reply"),
        sa.Column("transfer_s", sa.Double(), nullable=True, comment="null: no reply"),
        sa.CheckConstraint(
            "state <> 'admitted' OR (update_digest IS NOT NULL AND statement IS NOT NULL AND code IS NULL)",
            name=op.f("ck_participation_admitted"),
        ),
        sa.CheckConstraint("state IN ('offered', 'admitted', 'refused', 'silent', 'excluded')", name=op.f("ck_participation_state")),
        sa.CheckConstraint("state NOT IN ('refused', 'silent', 'excluded') OR code IS NOT NULL", name=op.f("ck_participation_reason")),
        sa.ForeignKeyConstraint(["run", "round_index"], ["round.run", "round.round_index"], name="fk_participation_run_round_index"),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_participation_site"),
        sa.PrimaryKeyConstraint("run", "round_index", "site", name="pk_participation"),
    )


def _evidence() -> None:
    op.create_table(
        "update_statement",
        sa.Column("run", sa.String(length=63), nullable=False),
        sa.Column("round_index", sa.Integer(), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["run", "round_index"], ["round.run", "round.round_index"], name="fk_update_statement_run_round_index"),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_update_statement_site"),
        sa.PrimaryKeyConstraint("run", "round_index", "site", name="pk_update_statement"),
        sa.UniqueConstraint("digest", name="uq_update_statement_digest"),
    )
    op.create_table(
        "quarantine",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("run", sa.String(length=63), nullable=False),
        sa.Column("round_index", sa.Integer(), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("code", sa.String(length=8), nullable=False),
        sa.Column("update_digest", sa.String(length=71), nullable=False),
        sa.Column("update_bytes", sa.BigInteger(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False, comment="relative to the server's home"),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run", "round_index"], ["round.run", "round.round_index"], name="fk_quarantine_run_round_index"),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_quarantine_site"),
        sa.PrimaryKeyConstraint("seq", name="pk_quarantine"),
        sa.UniqueConstraint(
            "run", "round_index", "site", "update_digest", "code", name="uq_quarantine_run_round_index_site_update_digest_code"
        ),
    )
    op.create_table(
        "audit_event",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(length=80), nullable=False, comment="operator, site:<name> or server"),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False, comment="canonical JSON"),
        sa.PrimaryKeyConstraint("seq", name="pk_audit_event"),
    )


def _guard_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
    )
    for table in _APPEND_ONLY:
        op.execute(f"CREATE TRIGGER {table}_rows_stay BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION refuse_change()")
        op.execute(f"CREATE TRIGGER {table}_stays BEFORE TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()")


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
