"""The server database's declared tables.

Every time is UTC seconds as a double (`..._at`): the messages and the clock carry the same number, SQLite and PostgreSQL keep it bit for
bit, and no driver can attach a time zone to it. Every duration is seconds as a double (`..._s`). A column is nullable only where "not
yet" or "none" has a meaning, which its comment names.

The tables of `APPEND_ONLY` are evidence: triggers made by the migrations refuse to change or delete their rows on both databases, and
`log_entry` takes the next index alone. `migrations/` makes these tables; a test demands that the two agree.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

#: Tables whose rows are never changed or deleted.
APPEND_ONLY = (
    "approval",
    "audit_event",
    "cosignature",
    "decision",
    "log_checkpoint",
    "log_entry",
    "release",
    "site_key",
    "update_statement",
)

_NAME = String(63)
_DIGEST = String(71)
_CODE = String(8)
_STATE = String(16)
# SQLite numbers rows by itself only where the type is spelled INTEGER; its integers have 64 bits all the same.
_SERIAL = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


def _one_of(*states: str) -> CheckConstraint:
    return CheckConstraint("state IN (" + ", ".join(f"'{state}'" for state in states) + ")", name="state")


site = Table(
    "site",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("evidence_key", String(80), nullable=False, unique=True, comment="ed25519:<base64>"),
    Column("flower_key", Text, nullable=False, unique=True, comment="OpenSSH text of the Flower node key"),
    Column("state", _STATE, nullable=False),
    Column("enrolled_at", Double, nullable=False),
    Column("revoked_at", Double, comment="null: not revoked"),
    Column("suspended_at", Double, comment="null: not suspended"),
    Column("reinstated_at", Double, comment="from when on refusals count towards a suspension; null: from the first"),
    _one_of("enrolled", "revoked"),
)

site_key = Table(
    "site_key",
    metadata,
    Column("seq", _SERIAL, primary_key=True, autoincrement=True),
    Column("site", _NAME, ForeignKey(site.c.name), nullable=False),
    Column("kind", _STATE, nullable=False),
    Column("key", Text, nullable=False, unique=True, comment="as in site; no key is ever used twice"),
    Column("continuity", LargeBinary, comment="what the key before it signed to hand over; null: the site's first"),
    Column("at", Double, nullable=False),
    CheckConstraint("kind IN ('evidence', 'flower')", name="kind"),
)

certificate = Table(
    "certificate",
    metadata,
    Column("serial", String(40), primary_key=True, comment="hex"),
    Column("site", _NAME, ForeignKey(site.c.name), nullable=False),
    Column("tls_key", _DIGEST, nullable=False, unique=True, comment="digest of the public key, DER"),
    Column("fingerprint", _DIGEST, nullable=False, comment="digest of the certificate, DER"),
    Column("issuer", _DIGEST, nullable=False, comment="pin of the certificate authority"),
    Column("pem", LargeBinary, nullable=False),
    Column("issued_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("first_used_at", Double, comment="null: no call has come with it"),
    Column("revoked_at", Double, comment="from when on it is refused, which may be to come; null: not revoked"),
)

invitation = Table(
    "invitation",
    metadata,
    Column("secret_hash", _DIGEST, primary_key=True),
    Column("site", _NAME, nullable=False, comment="who is invited; no site of that name need exist yet"),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("withdrawn_at", Double, comment="null: not withdrawn"),
)

enrolment = Table(
    "enrolment",
    metadata,
    Column("invitation", _DIGEST, ForeignKey(invitation.c.secret_hash), primary_key=True, comment="one request an invitation"),
    Column("site", _NAME, nullable=False),
    Column("site_card", LargeBinary, nullable=False),
    Column("tls_csr", LargeBinary, nullable=False, comment="PKCS #10, DER"),
    Column("software", String(40), nullable=False),
    Column("state", _STATE, nullable=False),
    Column("asked_at", Double, nullable=False),
    Column("decided_at", Double, comment="null: pending"),
    Column("serial", String(40), ForeignKey(certificate.c.serial), comment="of the certificate; null: not admitted"),
    CheckConstraint("(state = 'pending') = (decided_at IS NULL)", name="decided"),
    CheckConstraint("(state = 'admitted') = (serial IS NOT NULL)", name="admitted"),
    _one_of("pending", "admitted", "refused"),
)

site_report = Table(
    "site_report",
    metadata,
    Column("site", _NAME, ForeignKey(site.c.name), primary_key=True),
    Column("software", String(40), nullable=False),
    Column("state", _STATE, nullable=False),
    Column("reported_at", Double, nullable=False),
    _one_of("running", "stopped"),
)

operator = Table(
    "operator",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("role", _STATE, nullable=False),
    Column("key", String(80), nullable=False, unique=True, comment="ed25519:<base64>"),
    Column("added_at", Double, nullable=False),
    Column("removed_at", Double, comment="null: not removed"),
    CheckConstraint("role IN ('admin', 'operator', 'auditor')", name="role"),
)

plan = Table(
    "plan",
    metadata,
    Column("digest", _DIGEST, primary_key=True),
    Column("name", _NAME, nullable=False),
    Column("canonical", LargeBinary, nullable=False, comment="the plan's canonical bytes, which the digest names"),
    Column("signed", LargeBinary, nullable=False, comment="DSSE envelope over them"),
    Column("published_at", Double, nullable=False),
)

approval = Table(
    "approval",
    metadata,
    Column("site", _NAME, ForeignKey(site.c.name), nullable=False),
    Column("plan", _DIGEST, ForeignKey(plan.c.digest), nullable=False),
    Column("declared_patients", BigInteger, nullable=False),
    Column("reply_slots", Boolean, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    Column("approved_at", Double, nullable=False),
    PrimaryKeyConstraint("site", "plan"),
    CheckConstraint("declared_patients >= 1", name="declared_patients"),
)

decision = Table(
    "decision",
    metadata,
    Column("seq", _SERIAL, primary_key=True, autoincrement=True),
    Column("site", _NAME, ForeignKey(site.c.name), nullable=False),
    Column("plan", _DIGEST, ForeignKey(plan.c.digest), nullable=False),
    Column("kind", _STATE, nullable=False, comment="a word against the plan; a revocation is for good"),
    Column("envelope", LargeBinary, nullable=False),
    Column("digest", _DIGEST, nullable=False, unique=True, comment="of the envelope"),
    Column("decided_at", Double, nullable=False, comment="by the site's clock"),
    CheckConstraint("kind IN ('rejection', 'revocation')", name="kind"),
)

run = Table(
    "run",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("plan", _DIGEST, ForeignKey(plan.c.digest), nullable=False),
    Column("state", _STATE, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False, comment="failed attempts at the next round since it was last committed or reopened"),
    Column("planned_at", Double, nullable=False),
    Column("started_at", Double, comment="null: never taken up"),
    Column("ended_at", Double, comment="null: not ended"),
    Column("code", _CODE, comment="why the run failed; null: it did not"),
    _one_of("planned", "running", "pausing", "paused", "draining", "finished", "failed", "stopped"),
)

run_site = Table(
    "run_site",
    metadata,
    Column("run", _NAME, ForeignKey(run.c.name), nullable=False),
    Column("site", _NAME, ForeignKey(site.c.name), nullable=False),
    Column("left_at", Double, comment="null: the site is in the run"),
    PrimaryKeyConstraint("run", "site"),
)

round_ = Table(
    "round",
    metadata,
    Column("run", _NAME, ForeignKey(run.c.name), nullable=False),
    Column("round_index", Integer, nullable=False),
    Column("state", _STATE, nullable=False),
    Column("attempt", Integer, nullable=False, comment="how often the round has been offered"),
    Column("base_state", _DIGEST, nullable=False),
    Column("next_state", _DIGEST, comment="null: not committed"),
    Column("offered_at", Double, comment="null: planned only"),
    Column("deadline", Double, comment="null: planned only"),
    Column("committed_at", Double, comment="null: not committed"),
    Column("code", _CODE, comment="why its last attempt failed; null: it did not"),
    Column("exchange_s", Double, comment="this and the durations below: null until committed"),
    Column("transfer_s", Double),
    Column("admission_s", Double),
    Column("aggregation_s", Double),
    Column("step_s", Double),
    PrimaryKeyConstraint("run", "round_index"),
    CheckConstraint("round_index >= 1", name="round_index"),
    CheckConstraint("state <> 'committed' OR (next_state IS NOT NULL AND committed_at IS NOT NULL)", name="committed"),
    _one_of("planned", "offered", "training", "collecting", "admitted", "committed", "failed"),
)

participation = Table(
    "participation",
    metadata,
    Column("run", _NAME, nullable=False),
    Column("round_index", Integer, nullable=False),
    Column("site", _NAME, ForeignKey(site.c.name), nullable=False),
    Column("state", _STATE, nullable=False),
    Column("code", _CODE, comment="why refused, silent or excluded; null otherwise"),
    Column("released", _CODE, comment="why it was refused before an operator released it; null: it was not"),
    Column("update_digest", _DIGEST, comment="null: no update came"),
    Column("update_bytes", BigInteger, comment="null: no update came"),
    Column("statement", _DIGEST, comment="digest of the envelope; null: not admitted"),
    Column("weight", Double, comment="share in the mean; null: the round is not committed, or the site is not in it"),
    Column("epsilon_plan", Double, comment="as the site states it; null: not admitted, as in the columns below"),
    Column("epsilon_total", Double),
    Column("rounding", Double, comment="bound on the L2 norm of what the wire format's rounding added to the update"),
    Column("loss_sum", Double),
    Column("loss_sum_std", Double),
    Column("patients", Double),
    Column("patients_std", Double),
    Column("reply_slot_s", Double, comment="null: no reply, or replies are not slotted"),
    Column("offered_at", Double, comment="null: excluded"),
    Column("received_at", Double, comment="null: no reply"),
    Column("transfer_s", Double, comment="null: no reply"),
    PrimaryKeyConstraint("run", "round_index", "site"),
    ForeignKeyConstraint(["run", "round_index"], ["round.run", "round.round_index"]),
    CheckConstraint("state <> 'admitted' OR (update_digest IS NOT NULL AND statement IS NOT NULL AND code IS NULL)", name="admitted"),
    CheckConstraint("state NOT IN ('refused', 'silent', 'excluded') OR code IS NOT NULL", name="reason"),
    _one_of("offered", "admitted", "refused", "silent", "excluded"),
)

update_statement = Table(
    "update_statement",
    metadata,
    Column("run", _NAME, nullable=False),
    Column("round_index", Integer, nullable=False),
    Column("site", _NAME, ForeignKey(site.c.name), nullable=False),
    Column("digest", _DIGEST, nullable=False, unique=True),
    Column("envelope", LargeBinary, nullable=False),
    PrimaryKeyConstraint("run", "round_index", "site"),
    ForeignKeyConstraint(["run", "round_index"], ["round.run", "round.round_index"]),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("seq", _SERIAL, primary_key=True, autoincrement=True),
    Column("run", _NAME, nullable=False),
    Column("round_index", Integer, nullable=False),
    Column("site", _NAME, ForeignKey(site.c.name), nullable=False),
    Column("code", _CODE, nullable=False),
    Column("update_digest", _DIGEST, nullable=False),
    Column("update_bytes", BigInteger, nullable=False),
    Column("path", Text, nullable=False, comment="relative to the server's home"),
    Column("at", Double, nullable=False),
    Column("released_at", Double, comment="null: not released, as in the columns below"),
    Column("released_by", String(80)),
    Column("release_reason", Text),
    ForeignKeyConstraint(["run", "round_index"], ["round.run", "round.round_index"]),
    UniqueConstraint("run", "round_index", "site", "update_digest", "code"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("run", _NAME, ForeignKey(run.c.name), nullable=False),
    Column("round_index", Integer, nullable=False, comment="0: the initial state"),
    Column("state", _DIGEST, nullable=False),
    Column("state_path", Text, nullable=False, comment="relative to the server's home"),
    Column("state_bytes", BigInteger, nullable=False),
    Column("optimiser", _DIGEST, nullable=False),
    Column("optimiser_path", Text, nullable=False, comment="relative to the server's home"),
    Column("optimiser_bytes", BigInteger, nullable=False),
    Column("committed_at", Double, nullable=False),
    PrimaryKeyConstraint("run", "round_index"),
)

audit_event = Table(
    "audit_event",
    metadata,
    Column("seq", _SERIAL, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("actor", String(80), nullable=False, comment="operator[:<name>], site:<name>, invited:<site> or server"),
    Column("action", String(40), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("detail", Text, nullable=False, comment="canonical JSON"),
)

log_entry = Table(
    "log_entry",
    metadata,
    Column("leaf_index", BigInteger, primary_key=True, autoincrement=False, comment="from 0, without gaps"),
    Column("kind", String(32), nullable=False),
    Column("leaf", LargeBinary, nullable=False, comment="the leaf's canonical bytes"),
    Column("leaf_hash", LargeBinary, nullable=False, unique=True, comment="RFC 9162 leaf hash, 32 bytes"),
    CheckConstraint("leaf_index >= 0", name="leaf_index"),
)

log_checkpoint = Table(
    "log_checkpoint",
    metadata,
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("note", LargeBinary, nullable=False, comment="C2SP signed note with the log's signature alone"),
    CheckConstraint("size >= 1", name="size"),
)

cosignature = Table(
    "cosignature",
    metadata,
    Column("size", BigInteger, ForeignKey(log_checkpoint.c.size), nullable=False),
    Column("site", _NAME, ForeignKey(site.c.name), nullable=False),
    Column("line", LargeBinary, nullable=False, comment="the note's signature line, without newline"),
    PrimaryKeyConstraint("size", "site"),
)

release = Table(
    "release",
    metadata,
    Column("digest", _DIGEST, primary_key=True, comment="of the release's manifest"),
    Column("run", _NAME, ForeignKey(run.c.name), nullable=False),
    Column("released_at", Double, nullable=False),
)

notification = Table(
    "notification",
    metadata,
    Column("receiver", _NAME, primary_key=True),
    Column("after", BigInteger, nullable=False, comment="events up to this number are done with"),
    Column("until", BigInteger, comment="last event of the message under way; null: none is"),
    Column("events", Integer, nullable=False, comment="that the message under way tells of"),
    Column("began_at", Double, comment="null: no message is under way"),
    Column("attempts", Integer, nullable=False, comment="at the message under way"),
    Column("next_at", Double, comment="null: at once"),
    Column("code", _CODE, comment="why the last attempt failed; null: it did not"),
    Column("sent", BigInteger, nullable=False, comment="messages that arrived"),
    Column("sent_at", Double, comment="null: none has arrived"),
    Column("given_up", BigInteger, nullable=False, comment="messages given up"),
    CheckConstraint("(until IS NULL) = (began_at IS NULL)", name="under_way"),
)
