"""Cards, approvals and signed plans: who must sign what, and exact forms."""

import json
from dataclasses import replace
from typing import Any

import pytest

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, PathfedError, PlanError, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.plan import Plan
from pathfed_common.provenance import cosigned, documents, dsse
from pathfed_common.provenance.documents import REJECTION, REVOCATION, Approval, Decision, ServerCard, SiteCard, open_plan, seal_plan
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.units import UtcSeconds

KEY = SigningKey.generate()
OTHER = SigningKey.generate()
SITE = SiteCard(site=SiteName("a"), evidence_key=KEY.public, flower_key="ecdsa-sha2-nistp384 AAAA")
SERVER = ServerCard(
    name="north",
    evidence_key=KEY.public,
    ca_pem="-----BEGIN CERTIFICATE-----\n",
    fleet_address="10.0.0.1:9092",
    control_address="10.0.0.1:9093",
    enrolment_address="10.0.0.1:9094",
)


def _approval() -> Approval:
    return Approval(
        site=SiteName("a"), plan=digest.of_bytes(b"plan"), declared_patients=40, reply_slots=True, approved_at=UtcSeconds(1_700_000_000)
    )


@pytest.mark.parametrize("card", [SITE, SERVER], ids=["site", "server"])
def test_cards_round_trip_and_are_signed_by_the_key_they_name(card: Any) -> None:
    data = card.to_bytes(KEY)
    assert type(card).from_bytes(data) == card
    assert dsse.parse(data).key_id == KEY.key_id
    with pytest.raises(ValueError, match="evidence key it names"):
        card.to_bytes(OTHER)


@pytest.mark.parametrize("card", [SITE, SERVER], ids=["site", "server"])
def test_a_card_signed_by_another_key_is_refused(card: Any) -> None:
    kind = documents.SITE_CARD_TYPE if card is SITE else documents.SERVER_CARD_TYPE
    forged = dsse.seal(digest.canonical(card.plain()), kind, OTHER)
    with pytest.raises(ProvenanceError) as caught:
        type(card).from_bytes(forged, where="card.dsse")
    assert (caught.value.code, caught.value.where) == (ErrorCode.RECORD_SIGNATURE, "card.dsse")


def test_a_card_of_one_kind_is_not_one_of_another() -> None:
    as_server = dsse.seal(digest.canonical(SITE.plain()), documents.SERVER_CARD_TYPE, KEY)
    for kind in (SiteCard, ServerCard):
        with pytest.raises(ProvenanceError):
            kind.from_bytes(as_server)


def test_a_change_of_any_byte_of_a_card_is_found() -> None:
    data = SITE.to_bytes(KEY)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(ProvenanceError):
            SiteCard.from_bytes(bytes(changed))


@pytest.mark.parametrize("change", [{"site": "A"}, {"evidence_key": "ed25519:x"}, {"flower_key": None}, {"extra": 1}, {"evidence_key": 5}])
def test_a_malformed_card_is_refused_by_code(change: dict[str, Any]) -> None:
    data = dsse.seal(digest.canonical({**SITE.plain(), **change}), documents.SITE_CARD_TYPE, KEY)
    with pytest.raises(ProvenanceError) as caught:
        SiteCard.from_bytes(data)
    assert caught.value.code == ErrorCode.RECORD_CHANGED


def test_cards_hold_keys_as_keys() -> None:
    assert isinstance(SiteCard.from_bytes(SITE.to_bytes(KEY)).evidence_key, VerifyKey)
    with pytest.raises(ValueError, match="evidence_key must be VerifyKey"):
        SiteCard(site=SiteName("a"), evidence_key=KEY.public.to_text(), flower_key="x")  # type: ignore[arg-type]


def test_a_change_of_card_opens_with_the_key_that_stays_alone() -> None:
    card = SITE.to_bytes(KEY)
    change = documents.seal_card_change(card, KEY)
    assert documents.open_card_change(change, KEY.public) == card
    for data, key in ((change, OTHER.public), (card, KEY.public), (documents.seal_card_change(card, OTHER), KEY.public)):
        with pytest.raises(ProvenanceError, match="PF602"):
            documents.open_card_change(data, key)


def test_approval_round_trips_and_opens_with_the_sites_key_alone() -> None:
    approval = _approval()
    data = approval.to_bytes(KEY)
    assert Approval.from_bytes(data, KEY.public) == approval
    assert isinstance(approval.approved_at, float)
    with pytest.raises(ProvenanceError, match="PF602"):
        Approval.from_bytes(data, OTHER.public)


@pytest.mark.parametrize("change", [{"declared_patients": 0}, {"declared_patients": 1.0}, {"reply_slots": 1}, {"approved_at": -1}], ids=str)
def test_approvals_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    raw = {**_approval().plain(), **change}
    with pytest.raises(ValueError, match=next(iter(change))):
        Approval.from_plain(raw)
    with pytest.raises(ProvenanceError, match="PF601"):
        Approval.from_bytes(dsse.seal(digest.canonical(raw), documents.APPROVAL_TYPE, KEY), KEY.public)


def test_signed_plan_opens_to_the_plan(plan: Plan) -> None:
    data = seal_plan(plan, KEY)
    assert open_plan(data, KEY.public) == plan
    assert dsse.parse(data).payload == plan.canonical_bytes()


@pytest.mark.parametrize("kind", ["other key", "other type", "not canonical", "not a plan"])
def test_an_unauthentic_plan_is_a_plan_error(kind: str, plan: Plan) -> None:
    loose = json.dumps(json.loads(plan.canonical_bytes())).encode()
    data = {
        "other key": seal_plan(plan, OTHER),
        "other type": dsse.seal(plan.canonical_bytes(), documents.APPROVAL_TYPE, KEY),
        "not canonical": dsse.seal(loose, documents.PLAN_TYPE, KEY),
        "not a plan": dsse.seal(b"{}", documents.PLAN_TYPE, KEY),
    }[kind]
    with pytest.raises(PlanError) as caught:
        open_plan(data, KEY.public)
    assert caught.value.code == (ErrorCode.PLAN_WRONG_TYPE if kind == "not a plan" else ErrorCode.PLAN_NOT_AUTHENTIC)
    assert isinstance(caught.value, PathfedError)


def test_an_approval_that_names_nobody_keeps_the_bytes_it_had_before_there_were_names() -> None:
    unnamed = _approval()
    assert "named_as" not in unnamed.plain()
    assert Approval.from_bytes(unnamed.to_bytes(KEY), KEY.public) == unnamed
    named = replace(unnamed, named_as="St Elsewhere")
    assert Approval.from_bytes(named.to_bytes(KEY), KEY.public).named_as == "St Elsewhere"
    spelled = dsse.seal(digest.canonical({**unnamed.plain(), "named_as": ""}), documents.APPROVAL_TYPE, KEY)
    with pytest.raises(ProvenanceError):
        Approval.from_bytes(spelled, KEY.public)


def _decision(**changes: Any) -> Decision:
    values: dict[str, Any] = {"kind": REVOCATION, "approval": digest.of_bytes(b"approval"), "reason": "the ethics board asks for it"}
    values |= {"site": SiteName("a"), "plan": digest.of_bytes(b"plan"), "decided_at": UtcSeconds(1_700_000_000), **changes}
    return Decision(**values)


@pytest.mark.parametrize("made", [_decision(), _decision(kind=REJECTION, approval=None, reason="")], ids=["revocation", "rejection"])
def test_decisions_round_trip_and_are_signed_by_the_site(made: Decision) -> None:
    data = made.to_bytes(KEY)
    assert Decision.from_bytes(data, KEY.public) == made
    with pytest.raises(ProvenanceError, match="PF602"):
        Decision.from_bytes(data, OTHER.public)
    with pytest.raises(ProvenanceError, match="PF602"):
        Approval.from_bytes(data, KEY.public)
    with pytest.raises(ProvenanceError, match="PF602"):
        Decision.from_bytes(_approval().to_bytes(KEY), KEY.public)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "veto"},
        {"approval": None},
        {"kind": REJECTION},
        {"reason": "x" * 201},
        {"reason": "two\nlines"},
        {"reason": "\x1b[2J"},
        {"decided_at": 0.0},
        {"site": "A B"},
        {"plan": "sha256:1"},
    ],
)
def test_decisions_that_say_nothing_or_too_much_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        _decision(**changes)


@pytest.mark.parametrize("name", ["site", "plan", "kind", "approval", "reason", "decided_at", "more"])
def test_a_decision_is_read_strictly(name: str) -> None:
    plain = _decision().plain()
    plain = {**plain, name: "other"} if name == "more" else {key: value for key, value in plain.items() if key != name}
    with pytest.raises(ProvenanceError, match="PF601"):
        Decision.from_bytes(dsse.seal(digest.canonical(plain), documents.DECISION_TYPE, KEY), KEY.public)


def test_a_plan_may_be_signed_by_operators_besides(plan: Plan) -> None:
    signed = cosigned.cosign(seal_plan(plan, KEY), OTHER)
    assert open_plan(signed, KEY.public) == plan
    assert open_plan(signed, OTHER.public) == plan
    with pytest.raises(PlanError, match="PF106"):
        open_plan(signed, SigningKey.generate().public)
