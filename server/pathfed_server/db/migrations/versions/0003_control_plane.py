"""The control plane: invitations, enrolments, certificates, the history of sites' keys, what sites report, operators.

Revision: 0003, after 0002.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ACTOR = "operator[:<name>], site:<name>, invited:<site> or server"


def upgrade() -> None:
    """Apply."""
    _certificates()
    _enrolment()
    _people()
    _site_keys()
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE TRIGGER site_key_rows_stay BEFORE UPDATE OR DELETE ON site_key FOR EACH ROW EXECUTE FUNCTION refuse_change()")
        op.execute("CREATE TRIGGER site_key_stays BEFORE TRUNCATE ON site_key FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()")
        op.execute(f"COMMENT ON COLUMN audit_event.actor IS '{_ACTOR}'")
    else:
        _guard_sqlite()


def _certificates() -> None:
    op.create_table(
        "certificate",
        sa.Column("serial", sa.String(length=40), nullable=False, comment="hex"),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("tls_key", sa.String(length=71), nullable=False, comment="digest of the public key, DER"),
        sa.Column("fingerprint", sa.String(length=71), nullable=False, comment="digest of the certificate, DER"),
        sa.Column("issuer", sa.String(length=71), nullable=False, comment="pin of the certificate authority"),
        sa.Column("pem", sa.LargeBinary(), nullable=False),
        sa.Column("issued_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("first_used_at", sa.Double(), nullable=True, comment="null: no call has come with it"),
        sa.Column("revoked_at", sa.Double(), nullable=True, comment="from when on it is refused, which may be to come; null: not revoked"),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_certificate_site"),
        sa.PrimaryKeyConstraint("serial", name="pk_certificate"),
        sa.UniqueConstraint("tls_key", name="uq_certificate_tls_key"),
    )


def _enrolment() -> None:
    op.create_table(
        "invitation",
        sa.Column("secret_hash", sa.String(length=71), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False, comment="who is invited; no site of that name need exist yet"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("withdrawn_at", sa.Double(), nullable=True, comment="null: not withdrawn"),
        sa.PrimaryKeyConstraint("secret_hash", name="pk_invitation"),
    )
    op.create_table(
        "enrolment",
        sa.Column("invitation", sa.String(length=71), nullable=False, comment="one request an invitation"),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("site_card", sa.LargeBinary(), nullable=False),
        sa.Column("tls_csr", sa.LargeBinary(), nullable=False, comment="PKCS #10, DER"),
        sa.Column("software", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.Column("decided_at", sa.Double(), nullable=True, comment="null: pending"),
        sa.Column("serial", sa.String(length=40), nullable=True, comment="of the certificate; null: not admitted"),
        sa.CheckConstraint("(state = 'pending') = (decided_at IS NULL)", name=op.f("ck_enrolment_decided")),
        sa.CheckConstraint("(state = 'admitted') = (serial IS NOT NULL)", name=op.f("ck_enrolment_admitted")),
        sa.CheckConstraint("state IN ('pending', 'admitted', 'refused')", name=op.f("ck_enrolment_state")),
        sa.ForeignKeyConstraint(["invitation"], ["invitation.secret_hash"], name="fk_enrolment_invitation"),
        sa.ForeignKeyConstraint(["serial"], ["certificate.serial"], name="fk_enrolment_serial"),
        sa.PrimaryKeyConstraint("invitation", name="pk_enrolment"),
    )


def _people() -> None:
    op.create_table(
        "site_report",
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("software", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reported_at", sa.Double(), nullable=False),
        sa.CheckConstraint("state IN ('running', 'stopped')", name=op.f("ck_site_report_state")),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_site_report_site"),
        sa.PrimaryKeyConstraint("site", name="pk_site_report"),
    )
    op.create_table(
        "operator",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("key", sa.String(length=80), nullable=False, comment="ed25519:<base64>"),
        sa.Column("added_at", sa.Double(), nullable=False),
        sa.Column("removed_at", sa.Double(), nullable=True, comment="null: not removed"),
        sa.CheckConstraint("role IN ('admin', 'operator', 'auditor')", name=op.f("ck_operator_role")),
        sa.PrimaryKeyConstraint("name", name="pk_operator"),
        sa.UniqueConstraint("key", name="uq_operator_key"),
    )


def _site_keys() -> None:
    op.create_table(
        "site_key",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("key", sa.Text(), nullable=False, comment="as in site; no key is ever used twice"),
        sa.Column(
            "continuity", sa.LargeBinary(), nullable=True, comment="what the key before it signed to hand over; null: the site's first"
        ),
        sa.Column("at", sa.Double(), nullable=False),
        sa.CheckConstraint("kind IN ('evidence', 'flower')", name=op.f("ck_site_key_kind")),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_site_key_site"),
        sa.PrimaryKeyConstraint("seq", name="pk_site_key"),
        sa.UniqueConstraint("key", name="uq_site_key_key"),
    )
    for kind in ("evidence", "flower"):
        op.execute(f"INSERT INTO site_key (site, kind, key, at) SELECT name, '{kind}', {kind}_key, enrolled_at FROM site")  # noqa: S608


def _guard_sqlite() -> None:
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER site_key_no_{verb.lower()} BEFORE {verb} ON site_key BEGIN SELECT RAISE(ABORT, 'site_key is append-only'); END"
        )
    # INSERT OR REPLACE deletes the old row without its delete trigger.
    op.execute(
        "CREATE TRIGGER site_key_no_replace BEFORE INSERT ON site_key "
        "WHEN EXISTS (SELECT 1 FROM site_key WHERE seq = NEW.seq OR key = NEW.key) "
        "BEGIN SELECT RAISE(ABORT, 'site_key is append-only'); END"
    )
