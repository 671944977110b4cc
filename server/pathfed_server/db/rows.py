"""What the store hands out: one frozen value a row. Times are UTC seconds."""

from dataclasses import dataclass
from typing import Any

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan, plan_from_bytes
from pathfed_common.provenance.documents import SiteCard
from pathfed_server.rounds.state import Quarantined, RoundState, RoundTimes, RunState, SiteState


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """An enrolled or revoked site with its public keys."""

    name: SiteName
    evidence_key: str
    flower_key: str
    state: SiteState
    enrolled_at: float
    revoked_at: float | None
    suspended_at: float | None = None
    reinstated_at: float | None = None

    def is_of(self, card: SiteCard) -> bool:
        """Whether a card is of this site and of its present keys."""
        return (self.name, self.evidence_key, self.flower_key) == (card.site, card.evidence_key.to_text(), card.flower_key)


@dataclass(frozen=True, kw_only=True)
class SiteKeyRow:
    """A key that a site has or had, in order of `seq`. `continuity` is what the key before it signed; None: the site's first."""

    seq: int
    site: SiteName
    kind: str
    key: str
    continuity: bytes | None
    at: float


@dataclass(frozen=True, kw_only=True)
class CertificateRow:
    """A site's TLS certificate.

    Attributes:
        serial: hex.
        site: whose it is.
        tls_key: digest of the public key, DER.
        fingerprint: digest of the certificate, DER.
        issuer: pin of the authority that issued it.
        pem: the certificate.
        issued_at: UTC seconds, as the times below.
        expires_at: when it ends by itself.
        first_used_at: None: no call has come with it.
        revoked_at: from when on it is refused, which may be to come; None: not revoked.
    """

    serial: str
    site: SiteName
    tls_key: Digest
    fingerprint: Digest
    issuer: Digest
    pem: bytes
    issued_at: float
    expires_at: float
    first_used_at: float | None = None
    revoked_at: float | None = None

    def stands(self, at: float) -> bool:
        """Whether calls that come with it are taken at that time."""
        return at < self.expires_at and (self.revoked_at is None or at < self.revoked_at)


@dataclass(frozen=True, kw_only=True)
class InvitationRow:
    """An invitation, by the hash of its secret. `withdrawn_at` None: not withdrawn."""

    secret_hash: Digest
    site: SiteName
    created_at: float
    expires_at: float
    withdrawn_at: float | None


@dataclass(frozen=True, kw_only=True)
class EnrolmentRow:
    """What somebody asked for with an invitation, and what became of it.

    Attributes:
        invitation: hash of the invitation's secret.
        site: the site.
        site_card: its signed card.
        tls_csr: PKCS #10 request for its TLS key, DER.
        software: pathfed's version at the site, as it says.
        state: "pending", "admitted" or "refused".
        asked_at: UTC seconds.
        decided_at: None: pending.
        serial: of the certificate; None: not admitted.
    """

    invitation: Digest
    site: SiteName
    site_card: bytes
    tls_csr: bytes
    software: str
    state: str
    asked_at: float
    decided_at: float | None = None
    serial: str | None = None


@dataclass(frozen=True, kw_only=True)
class SiteReportRow:
    """What a site last said of itself."""

    site: SiteName
    software: str
    state: str
    reported_at: float


@dataclass(frozen=True, kw_only=True)
class OperatorRow:
    """A person who runs the server. `role` is "admin", "operator" or "auditor"; `removed_at` None: not removed."""

    name: str
    role: str
    key: str
    added_at: float
    removed_at: float | None


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """A published plan: canonical bytes, and the operator's DSSE envelope over them."""

    digest: Digest
    name: str
    canonical: bytes
    signed: bytes
    published_at: float

    def plan(self) -> Plan:
        """The plan itself."""
        return plan_from_bytes(self.canonical, where=f"plan {self.digest}")


@dataclass(frozen=True, kw_only=True)
class ApprovalRow:
    """A site's approval of a plan."""

    site: SiteName
    plan: Digest
    declared_patients: int
    reply_slots: bool
    envelope: bytes
    approved_at: float


@dataclass(frozen=True, kw_only=True)
class DecisionRow:
    """A site's word against a plan: ``rejection`` or ``revocation``. `approval`: digest of the approval that is revoked, or None."""

    site: SiteName
    plan: Digest
    kind: str
    approval: Digest | None
    envelope: bytes
    decided_at: float


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run. `sites` are those listed in it, in name order."""

    name: RunName
    plan: Digest
    state: RunState
    attempt: int
    failures: int
    planned_at: float
    started_at: float | None
    ended_at: float | None
    code: str | None
    sites: tuple[SiteName, ...]


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """A round. `times` is None until it is committed; `code` says why its last attempt failed."""

    run: RunName
    round_index: int
    state: RoundState
    attempt: int
    base_state: Digest
    next_state: Digest | None
    offered_at: float | None
    deadline: float | None
    committed_at: float | None
    code: str | None
    times: RoundTimes | None


@dataclass(frozen=True, kw_only=True)
class OutcomeRow:
    """What became of a site in a round that it was asked in. `code`: why it did not count, or None."""

    run: RunName
    round_index: int
    state: str
    code: str | None
    offered_at: float


@dataclass(frozen=True, kw_only=True)
class QuarantineRow:
    """An update that was set aside, by its number, and who let it count all the same and why; None: nobody has."""

    number: int
    aside: Quarantined
    released_at: float | None
    released_by: str | None
    release_reason: str | None


@dataclass(frozen=True, kw_only=True)
class StatementRow:
    """An admitted site's signed statement."""

    run: RunName
    round_index: int
    site: SiteName
    digest: Digest
    envelope: bytes


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One event of the audit trail, in order of `seq`. `detail` is a JSON value."""

    seq: int
    at: float
    actor: str
    action: str
    subject: str
    detail: Any
