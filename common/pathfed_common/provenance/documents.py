"""Signed documents that pass between people before a run: cards, the signed plan, and a site's word on it.

A card introduces a site or the server by its keys and is signed by its own evidence key, which proves that whoever made it holds the key,
and nothing more: whose card it is, people settle by comparing key texts over another channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, PlanError, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan, plan_from_bytes
from pathfed_common.provenance import cosigned, dsse
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.values import Value, decode_value
from pathfed_common.units import UtcSeconds

SITE_CARD_TYPE = "application/vnd.pathfed.site-card.v1+json"
SERVER_CARD_TYPE = "application/vnd.pathfed.server-card.v1+json"
APPROVAL_TYPE = "application/vnd.pathfed.approval.v1+json"
DECISION_TYPE = "application/vnd.pathfed.decision.v1+json"
CARD_CHANGE_TYPE = "application/vnd.pathfed.site-card-change.v1+json"
PLAN_TYPE = "application/vnd.pathfed.plan.v1+json"
#: What a site may say of a plan beside approving it.
REJECTION = "rejection"
REVOCATION = "revocation"
LONGEST_REASON = 200

_LONGEST_PUBLIC_NAME = 120
_NAME_SIGNS = " .,:'&()/+-"


@dataclass(frozen=True, kw_only=True)
class SiteCard(Value):
    """A site introduces itself.

    Attributes:
        site: its name.
        evidence_key: the public key its statements are signed with.
        flower_key: the public key of its Flower node, OpenSSH text.
    """

    site: SiteName
    evidence_key: VerifyKey
    flower_key: str

    def to_bytes(self, key: SigningKey) -> bytes:
        """The card, signed by its own evidence key.

        Raises:
            ValueError: `key` is not the private half of `evidence_key`.
        """
        return _seal_card(self, self.evidence_key, SITE_CARD_TYPE, key)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "site card") -> Self:
        """Read a card and check that its own key signed it.

        Raises:
            ProvenanceError: PF602, it did not; PF601, not a site card.
        """
        card = decode_value(cls, dsse.parse(data, where=where).payload, where)
        dsse.open_envelope(data, payload_type=SITE_CARD_TYPE, keys=card.evidence_key, where=where)
        return card


@dataclass(frozen=True, kw_only=True)
class ServerCard(Value):
    """The server introduces itself.

    Attributes:
        name: the consortium's name.
        evidence_key: the public key its plans, offers and round records are signed with.
        ca_pem: the consortium's CA certificate, PEM.
        fleet_address: HOST:PORT of Flower's exchange, for the site's SuperNode.
        control_address: HOST:PORT of the control service, for the site's agent.
        enrolment_address: HOST:PORT of the enrolment service, for the first contact.
    """

    name: str
    evidence_key: VerifyKey
    ca_pem: str
    fleet_address: str
    control_address: str
    enrolment_address: str

    def to_bytes(self, key: SigningKey) -> bytes:
        """The card, signed by its own evidence key.

        Raises:
            ValueError: `key` is not the private half of `evidence_key`.
        """
        return _seal_card(self, self.evidence_key, SERVER_CARD_TYPE, key)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "server card") -> Self:
        """Read a card and check that its own key signed it.

        Raises:
            ProvenanceError: PF602, it did not; PF601, not a server card.
        """
        card = decode_value(cls, dsse.parse(data, where=where).payload, where)
        dsse.open_envelope(data, payload_type=SERVER_CARD_TYPE, keys=card.evidence_key, where=where)
        return card


@dataclass(frozen=True, kw_only=True)
class Approval(Value):
    """A site approves a plan by its digest.

    Attributes:
        site: the site.
        plan: digest of the plan.
        declared_patients: the public lower bound of its cohort, N_public.
        reply_slots: whether its replies wait for public time slots.
        approved_at: UTC seconds.
        named_as: what a release's model card may call the site; empty: it is counted there and not named. Left out of the bytes where it
            is empty, so that approvals made before there was such a field stay what they are.
    """

    site: SiteName
    plan: Digest
    declared_patients: int
    reply_slots: bool
    approved_at: UtcSeconds
    named_as: str = ""

    def _check(self) -> None:
        if self.declared_patients < 1:
            raise ValueError(f"declared_patients must be at least 1, got {self.declared_patients}")
        check_public_name(self.named_as)

    def plain(self) -> dict[str, Any]:
        """The approval as a JSON object."""
        raw = super().plain()
        return raw if self.named_as else {name: value for name, value in raw.items() if name != "named_as"}

    @classmethod
    def from_plain(cls, raw: object) -> Self:
        """See `Value.from_plain`."""
        return super().from_plain({"named_as": "", **raw} if isinstance(raw, dict) else raw)

    def to_bytes(self, key: SigningKey) -> bytes:
        """The approval, signed by the site's evidence key."""
        return dsse.seal(digest.canonical(self.plain()), APPROVAL_TYPE, key)

    @classmethod
    def from_bytes(cls, data: bytes, key: VerifyKey | Mapping[Digest, VerifyKey], *, where: str = "approval") -> Self:
        """Verify and read an approval.

        Raises:
            ProvenanceError: PF602, not signed by `key`, or one of them; PF601, not an approval.
        """
        return decode_value(cls, dsse.open_envelope(data, payload_type=APPROVAL_TYPE, keys=key, where=where), where)


@dataclass(frozen=True, kw_only=True)
class Decision(Value):
    """A site's word against a plan: it rejects it, or revokes its approval for good.

    Attributes:
        site: the site.
        plan: digest of the plan.
        kind: `REJECTION` or `REVOCATION`.
        approval: digest of the envelope of the approval that is revoked; None with a rejection.
        reason: what the site wants to say about it, in public; at most `LONGEST_REASON` characters, printable, may be empty.
        decided_at: UTC seconds.
    """

    site: SiteName
    plan: Digest
    kind: str
    approval: Digest | None
    reason: str
    decided_at: UtcSeconds

    def _check(self) -> None:
        if self.kind not in (REJECTION, REVOCATION):
            raise ValueError(f"kind must be {REJECTION!r} or {REVOCATION!r}, got {self.kind!r}")
        if (self.approval is not None) != (self.kind == REVOCATION):
            raise ValueError("a revocation names the approval that it revokes, a rejection names none")
        if len(self.reason) > LONGEST_REASON or not self.reason.isprintable():
            raise ValueError(f"reason must be one line of at most {LONGEST_REASON} printable characters")

    def to_bytes(self, key: SigningKey) -> bytes:
        """The decision, signed by the site's evidence key."""
        return dsse.seal(digest.canonical(self.plain()), DECISION_TYPE, key)

    @classmethod
    def from_bytes(cls, data: bytes, key: VerifyKey, *, where: str = "decision") -> Self:
        """Verify and read a decision.

        Raises:
            ProvenanceError: PF602, not signed by `key`; PF601, not a decision.
        """
        return decode_value(cls, dsse.open_envelope(data, payload_type=DECISION_TYPE, keys=key, where=where), where)


def check_public_name(text: str) -> str:
    """Check what a hospital may be called in public; empty is allowed.

    Raises:
        ValueError: longer than 120 characters, or with more than letters, digits, inner spaces and .,:'&()/+- in it: it stands in a page.
    """
    if len(text) > _LONGEST_PUBLIC_NAME or text != text.strip() or not all(sign.isalnum() or sign in _NAME_SIGNS for sign in text):
        raise ValueError(f"a public name is at most {_LONGEST_PUBLIC_NAME} letters, digits and {_NAME_SIGNS!r}, got {text[:130]!r}")
    return text


def seal_card_change(card: bytes, key: SigningKey) -> bytes:
    """A site's new card, signed again by the evidence key that it keeps: the continuity of a new Flower node key.

    The card's own signature says that who made the card holds its key. This one says that the site means it to replace the card before.
    """
    return dsse.seal(card, CARD_CHANGE_TYPE, key)


def open_card_change(data: bytes, key: VerifyKey, *, where: str = "card change") -> bytes:
    """Verify a change of card, and return the new card's bytes.

    Raises:
        ProvenanceError: PF602, not signed by `key` as a change of card.
    """
    return dsse.open_envelope(data, payload_type=CARD_CHANGE_TYPE, keys=key, where=where)


def seal_plan(plan: Plan, key: SigningKey) -> bytes:
    """The plan signed by the server: an envelope over its canonical bytes."""
    return dsse.seal(plan.canonical_bytes(), PLAN_TYPE, key)


def open_plan(data: bytes, key: VerifyKey, *, where: str = "signed plan") -> Plan:
    """Verify and read a signed plan. Operators may have signed it besides (`cosigned`); whether they must is the reader's policy.

    Raises:
        PlanError: PF106, not signed by `key`; other PF1xx, not a valid plan of this version.
    """
    try:
        payload = cosigned.open_cosigned(data, payload_type=PLAN_TYPE, key=key, where=where).payload
    except ProvenanceError as error:
        raise PlanError(ErrorCode.PLAN_NOT_AUTHENTIC, error.what, where=where, value=error.value) from error
    return plan_from_bytes(payload, where=where)


def _seal_card(card: Value, evidence_key: VerifyKey, payload_type: str, key: SigningKey) -> bytes:
    if key.public != evidence_key:
        raise ValueError("a card is signed by the evidence key it names")
    return dsse.seal(digest.canonical(card.plain()), payload_type, key)
