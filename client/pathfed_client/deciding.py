"""A site's word on plans: which there are, and approving, rejecting and revoking them.

Nothing is asked of a site but through a signed plan, and nothing is promised but by a document that its evidence key signs. Each of these
writes the document for the operator, so that a site without a connection to the control plane hands it over as a file.
"""

import os
import re
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from pathfed_client.app import check_devices, open_store, plan_epsilon
from pathfed_client.gate import second_person
from pathfed_client.gate.site_policy import check_operators, check_plan
from pathfed_client.gating import signed_by
from pathfed_client.home import SiteHome
from pathfed_client.io import site_cohort
from pathfed_client.io.server_records import ReceivedPlan
from pathfed_client.io.site_records import ApprovalState, ApproverSignature, Event, StoredApproval
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest, files
from pathfed_common.digest import Digest, short
from pathfed_common.errors import ErrorCode, HostError, PrivacyError, SiteDataError, TransportError
from pathfed_common.plan import Plan
from pathfed_common.provenance.documents import REJECTION, REVOCATION, Approval, Decision, check_public_name, open_plan
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.log_leaves import PlanApproved, PlanDecided
from pathfed_common.units import UtcSeconds

_APPROVER = re.compile(r"[a-z](?:[a-z0-9.-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Signer:
    """A person who approves, with the private key that is theirs alone."""

    name: str
    key: SigningKey = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class KnownPlan:
    """A plan that this site's server has signed.

    Attributes:
        plan: the plan.
        signed: its envelope, with the signatures of operators besides.
        word: the site's latest word on it, or None.
        received_at: UTC seconds, or None where it never came but as a file.
    """

    plan: Plan
    signed: bytes = field(repr=False)
    word: StoredApproval | None
    received_at: float | None

    @property
    def state(self) -> str:
        """The site's word, or ``undecided``."""
        return "undecided" if self.word is None else self.word.state.value


@dataclass(frozen=True, kw_only=True)
class Approving:
    """What approving came to.

    Attributes:
        plan: the plan.
        approval: the site's approval, or None while another person must sign.
        signed_by: who has signed, where the site's policy wants two.
    """

    plan: Plan
    approval: Approval | None
    signed_by: Sequence[str] = ()


def known_plans(home: SiteHome, store: SiteStore) -> list[KnownPlan]:
    """Every plan that was received or decided on, the oldest first.

    Raises:
        PlanError: PF106, one is not signed by this site's server.
    """
    words = {word.plan: word for word in store.approvals()}
    received = {one.plan: one for one in store.received_plans()}
    signed = {plan: word.signed_plan for plan, word in words.items()} | {plan: one.signed_plan for plan, one in received.items()}
    found = [
        KnownPlan(
            plan=open_plan(envelope, home.server_card.evidence_key),
            signed=envelope,
            word=words.get(name),
            received_at=received[name].at if name in received else None,
        )
        for name, envelope in signed.items()
    ]
    return sorted(found, key=lambda one: (one.received_at or (one.word.at if one.word else 0.0), one.plan.digest))


def find_plan(home: SiteHome, store: SiteStore, given: str) -> KnownPlan:
    """The plan that a person means: a file with a signed plan, the beginning of a digest, or a name that is one plan's alone.

    A plan from a file is kept, with the signatures that were not known.

    Raises:
        TransportError: PF444, no plan here goes by this, or several do.
        PlanError: PF106, the file's plan is not signed by this site's server.
        HostError: PF904, the file cannot be read.
    """
    if Path(given).is_file() or os.sep in given or given.endswith(".dsse"):
        data = files.read_given(Path(given))
        plan = open_plan(data, home.server_card.evidence_key, where=given)
        store.add_received_plan(ReceivedPlan(plan=plan.digest, signed_plan=data, at=time.time()))
        return next(one for one in known_plans(home, store) if one.plan.digest == plan.digest)
    known = known_plans(home, store)
    start = given.removeprefix("sha256:")
    found = [one for one in known if start and (one.plan.name == given or one.plan.digest.removeprefix("sha256:").startswith(start))]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{one.plan.name} {short(one.plan.digest)}" for one in (found or known))
    what = f"{len(found)} plans go by this" if found else "no plan here goes by this"
    remedy = f"name one by its digest: {listed}" if listed else "take the plan's file from the operator"
    raise TransportError(ErrorCode.PLAN_NOT_HERE, what, value=given, remedy=remedy)


def approve(
    home: SiteHome,
    given: str | Path,
    declared_patients: int,
    out: Path | None = None,
    signer: Signer | None = None,
    named_as: str = "",
) -> Approving:
    """Approve a plan: check it against the policy and the scan, record it, write the signed approval for the operator.

    Where the policy wants a second person, this adds the signer's signature, and approves once two have signed the same figures.

    Args:
        home: the site.
        given: see `find_plan`.
        declared_patients: the public lower bound of the cohort.
        out: where the approval is written; None: in the home.
        signer: who approves, where the policy wants two people.
        named_as: what a release's model card may call the site, in public; empty: it is not named.

    Raises:
        PlanError, PrivacyError: the plan is not authentic, expects too many patients, or is more than the policy allows.
        SiteDataError: PF213, not scanned under this plan's rules; PF303 is raised where fewer patients were found than declared.
        TransportError: PF442, two people must sign and nobody is named; PF443, the signer is no approver; PF444; PF445, it was revoked, or
            stands approved with other figures or another name.
        HostError: PF910, a device that the policy names is not there; PF905, not a public name.
    """
    _check_name(named_as)
    with closing(open_store(home)) as store:
        known = find_plan(home, store, str(given))
        plan = known.plan
        _demand_not(known, ApprovalState.REVOKED, "an approval that was revoked is not given again", "ask for a plan of another name")
        wanted = Approval(
            site=home.name,
            plan=plan.digest,
            declared_patients=declared_patients,
            reply_slots=home.policy.reply_slots,
            approved_at=UtcSeconds(time.time()),
            named_as=named_as,
        )
        check_operators(home.policy, known.signed)
        check_devices(home)
        check_plan(home.policy, plan, declared_patients, plan_epsilon(plan, declared_patients, home.policy.delta))
        _check_cohort(home, store, plan, declared_patients)
        stands = _standing(home, known, wanted)
        people: frozenset[str] = frozenset()
        if home.policy.second_person:
            people = _sign(home, store, plan, declared_patients, signer)
            if len(people) < second_person.NEEDED:
                return Approving(plan=plan, approval=None, signed_by=sorted(people))
        approval = _approve(home, store, known, stands, wanted, out or word_file(home, plan.digest, "approval"))
    return Approving(plan=plan, approval=approval, signed_by=sorted(people))


def reject(home: SiteHome, given: str | Path, reason: str = "", out: Path | None = None) -> Decision:
    """Say no to a plan that was not approved; it may be approved later all the same.

    Raises:
        TransportError: PF444; PF445, it was approved or revoked.
        HostError: PF905, the reason is too long or more than a line.
    """
    with closing(open_store(home)) as store:
        known = find_plan(home, store, str(given))
        _demand_not(known, ApprovalState.APPROVED, "the plan was approved", "take the approval back with `pathfed-site revoke`")
        _demand_not(known, ApprovalState.REVOKED, "the approval was revoked", "nothing is left to reject")
        return _decide(home, store, known, REJECTION, reason, out)


def revoke(home: SiteHome, given: str | Path, reason: str = "", out: Path | None = None) -> Decision:
    """Take an approval back, for good: from now on nothing leaves for this plan, and a round under way comes to nothing.

    Raises:
        TransportError: PF444; PF445, it is not approved.
        HostError: PF905, the reason is too long or more than a line.
    """
    with closing(open_store(home)) as store:
        known = find_plan(home, store, str(given))
        if known.word is None or known.word.state is not ApprovalState.APPROVED:
            raise TransportError(
                ErrorCode.PLAN_DECIDED, "only an approved plan can be revoked", value=known.state, remedy="see `pathfed-site plans`"
            )
        return _decide(home, store, known, REVOCATION, reason, out)


def word_file(home: SiteHome, plan: Digest, kind: str) -> Path:
    """Where a word on a plan is written for the operator."""
    return home.root / f"{kind}-{short(plan)}.dsse"


def _standing(home: SiteHome, known: KnownPlan, wanted: Approval) -> Approval | None:
    """The approval that stands and says the same, or None where none stands.

    Raises:
        TransportError: PF445, the one that stands says something else. The server keeps the first for good.
    """
    if known.word is None or known.word.state is not ApprovalState.APPROVED:
        return None
    stands = Approval.from_bytes(known.word.signed_approval, home.evidence_keys)
    if replace(stands, approved_at=wanted.approved_at) != wanted:
        remedy = "revoke, and ask for a plan of another name"
        _demand_not(known, ApprovalState.APPROVED, "the plan was approved with other figures or another name", remedy)
    return stands


def _approve(home: SiteHome, store: SiteStore, known: KnownPlan, stands: Approval | None, wanted: Approval, out: Path) -> Approval:
    """Give the approval, or write the one again that stands and says the same: a site says a thing once."""
    if known.word is not None and stands is not None:
        files.write_atomic(out, known.word.signed_approval)
        return stands
    envelope = wanted.to_bytes(home.evidence_key)
    files.write_atomic(out, envelope)
    leaf = PlanApproved(site=home.name, plan=wanted.plan, approval=digest.of_bytes(envelope))
    _record(store, known, ApprovalState.APPROVED, envelope, leaf, wanted.approved_at, wanted.declared_patients)
    return wanted


def _check_name(text: str) -> None:
    try:
        check_public_name(text)
    except ValueError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, str(error), where="--named-as") from None


def _demand_not(known: KnownPlan, state: ApprovalState, what: str, remedy: str) -> None:
    if known.word is not None and known.word.state is state:
        raise TransportError(ErrorCode.PLAN_DECIDED, what, value=f"{known.plan.name} {short(known.plan.digest)}", remedy=remedy)


def _check_cohort(home: SiteHome, store: SiteStore, plan: Plan, declared_patients: int) -> None:
    found = site_cohort.summary(store, plan.cohort, home.pseudonym_key).patients
    if found == 0:
        raise SiteDataError(
            ErrorCode.NOT_SCANNED,
            "no slide was scanned under this plan's rules",
            remedy=f"pathfed-site scan {short(plan.digest)}",
        )
    if found < declared_patients:
        raise PrivacyError(
            ErrorCode.COHORT_TOO_SMALL,
            "the declared number of patients must be a lower bound of the cohort",
            value=f"declared {declared_patients}, found {found}",
            remedy="declare a round number at or below the patients you will always have",
        )


def _sign(home: SiteHome, store: SiteStore, plan: Plan, declared_patients: int, signer: Signer | None) -> frozenset[str]:
    """Add the signer's signature; who has signed these figures by now."""
    if signer is None:
        found = signed_by(home, store, plan.digest, declared_patients)
        second_person.check(found)
        return found
    approvers = {one.name: one.key for one in store.approvers()}
    if approvers.get(signer.name) != signer.key.public:
        raise TransportError(
            ErrorCode.APPROVER_UNKNOWN,
            "no approver of this name has this key",
            value=signer.name,
            remedy="`pathfed-site approvers list` shows names and keys",
        )
    now = UtcSeconds(time.time())
    consent = second_person.Consent(
        site=home.name, plan=plan.digest, declared_patients=declared_patients, approver=signer.name, signed_at=now
    )
    store.add_signature(ApproverSignature(plan=plan.digest, approver=signer.name, envelope=consent.to_bytes(signer.key), at=now))
    return signed_by(home, store, plan.digest, declared_patients)


def _decide(home: SiteHome, store: SiteStore, known: KnownPlan, kind: str, reason: str, out: Path | None) -> Decision:
    approval = None if kind == REJECTION or known.word is None else digest.of_bytes(known.word.signed_approval)
    now = UtcSeconds(time.time())
    try:
        decision = Decision(site=home.name, plan=known.plan.digest, kind=kind, approval=approval, reason=reason, decided_at=now)
    except ValueError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, str(error), where="--reason") from None
    envelope = decision.to_bytes(home.evidence_key)
    # Recorded first: from here on the site keeps to it, whatever becomes of the file for the operator.
    leaf = PlanDecided(site=home.name, plan=known.plan.digest, decision=digest.of_bytes(envelope))
    _record(store, known, ApprovalState.REJECTED if kind == REJECTION else ApprovalState.REVOKED, envelope, leaf, now)
    files.write_atomic(out or word_file(home, known.plan.digest, kind), envelope)
    return decision


def _record(
    store: SiteStore,
    known: KnownPlan,
    state: ApprovalState,
    envelope: bytes,
    leaf: PlanApproved | PlanDecided,
    now: float,
    declared_patients: int = 0,
) -> None:
    """Keep a word, and put it on its way to the server, whole or not at all."""
    with store.together():
        store.add_word(envelope, leaf.to_bytes(), now)
        store.add_approval(
            StoredApproval(
                plan=known.plan.digest,
                signed_plan=known.signed,
                signed_approval=envelope,
                declared_patients=declared_patients,
                at=now,
                state=state,
            )
        )
        store.add_event(Event(at=now, kind="plan", detail=f"{state.value} plan {known.plan.name} {short(known.plan.digest)}"))


def public_key(text: str) -> VerifyKey:
    """A person's public key as it was given.

    Raises:
        HostError: PF905, not `ed25519:<base64>`.
    """
    try:
        return VerifyKey.from_text(text)
    except ValueError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, str(error), where="--key", value=text[:80]) from None


def add_approver(home: SiteHome, name: str, key: VerifyKey) -> None:
    """Let a person sign approvals.

    Raises:
        TransportError: PF443, an approver of this name, or with this key, is there.
        HostError: PF905, not a name.
    """
    if _APPROVER.fullmatch(name) is None:
        what = "an approver's name has 1 to 63 lower-case letters, digits, dots and hyphens, and begins with a letter"
        raise HostError(ErrorCode.SETTINGS_INVALID, what, where="approver", value=name[:80])
    with closing(open_store(home)) as store:
        if not store.add_approver(name, key, at=time.time()):
            raise TransportError(
                ErrorCode.APPROVER_UNKNOWN,
                "an approver of this name, or with this key, is there already",
                value=name,
                remedy="two people, two names, two keys",
            )
        store.add_event(Event(at=time.time(), kind="approver", detail=f"added {name}"))


def remove_approver(home: SiteHome, name: str) -> None:
    """Let a person sign no more.

    Raises:
        TransportError: PF443, no approver has this name.
    """
    with closing(open_store(home)) as store:
        if not store.remove_approver(name, at=time.time()):
            raise TransportError(ErrorCode.APPROVER_UNKNOWN, "no approver has this name", value=name[:80])
        store.add_event(Event(at=time.time(), kind="approver", detail=f"removed {name}"))
