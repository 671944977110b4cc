"""The control port: what an enrolled site may ask and say, and that it is that site."""

import datetime
import time
from dataclasses import replace

import grpc
import pytest
from control_peer import Peer, call, control, control_channel, csr_of, enroll, new_key, new_node_key
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from pathfed_common import digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.provenance.documents import SiteCard, open_plan, seal_card_change
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import cosign_checkpoint, log_key, open_checkpoint, origin_of
from pathfed_common.provenance.log_leaves import KeyRotated, read_leaf, rotate_key
from pathfed_common.provenance.merkle import leaf_hash, verify_inclusion
from pathfed_common.provenance.note import Note
from pathfed_common.units import UtcSeconds
from pathfed_server import members
from pathfed_server.db import certificate_store
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds.state import Checkpoint, Participation, ParticipationState, RoundOpening
from pathfed_server.transport.certificates import make_ca, make_site_certificate, read_key

NORTH = SiteName("north")
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
CARD = pb.GetServerCardRequest()


def renewed(serving, peer: Peer, *, key=None) -> Peer:
    fresh = key or new_key()
    reply = control(serving, peer, "Renew", pb.RenewRequest(tls_csr_der=csr_of(fresh)))
    return replace(peer, tls=fresh, certificate=reply.certificate_pem, authorities=reply.ca_pem)


def forged(serving, peer: Peer, *, uri: str, ca: tuple[bytes, bytes] | None = None, days: int = 30, ago_days: int = 0) -> Peer:
    """A certificate that says what its maker likes, from the consortium's own authority or from another."""
    certificate, key = ca or (serving.ca_file.read_bytes(), serving.authority_files.key.read_bytes())
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=ago_days)
    issuer = x509.load_pem_x509_certificate(certificate)
    made = make_site_certificate(uri, peer.tls.public_key(), issuer, read_key(key), now=now, days=days)
    return replace(peer, certificate=made.public_bytes(serialization.Encoding.PEM))


def handed_over(site: str, old: SigningKey, new: SigningKey, at: float) -> KeyRotated:
    return rotate_key(SiteName(site), old, new, UtcSeconds(at))


# ---- who calls ----


def test_without_a_certificate_or_with_a_self_made_one_nobody_gets_past_tls(serving, enrolled, refused):
    north = enrolled("north")
    ca = make_ca("test", now=datetime.datetime.now(datetime.UTC))
    for peer in (None, forged(serving, north, uri="spiffe://test/site/north", ca=ca)):
        with refused(None, grpc.StatusCode.UNAVAILABLE):
            control(serving, peer, "GetServerCard", CARD)


def test_an_expired_certificate_does_not_get_past_tls(serving, enrolled, refused):
    late = forged(serving, enrolled("north"), uri="spiffe://test/site/north", days=1, ago_days=3)
    with refused(None, grpc.StatusCode.UNAVAILABLE):
        control(serving, late, "GetServerCard", CARD)


def test_a_certificate_of_the_authority_that_nobody_recorded_is_refused(serving, enrolled, refused):
    """Somebody who got at the authority's key for a moment has certificates that the database does not know."""
    with refused("PF415", UNAUTHENTICATED):
        control(serving, forged(serving, enrolled("north"), uri="spiffe://test/site/north"), "GetServerCard", CARD)


@pytest.mark.parametrize(
    "uri",
    ["spiffe://test/operator/north", "spiffe://other/site/north", "https://test/site/north", "spiffe://test/site/north/..", "x:y"],
)
def test_a_certificate_that_names_no_site_of_this_consortium_is_refused(serving, enrolled, refused, uri):
    with refused("PF415", UNAUTHENTICATED):
        control(serving, forged(serving, enrolled("north"), uri=uri), "GetServerCard", CARD)


def test_the_servers_own_certificate_opens_nothing(serving, refused):
    server = Peer(NORTH, tls=read_key(serving.tls_key.read_bytes()), certificate=serving.tls_certificate.read_bytes())
    with pytest.raises(grpc.RpcError):
        control(serving, server, "GetServerCard", CARD)


def test_a_site_speaks_for_itself_alone(serving, enrolled, plan, refused, store):
    """With its own certificate a site cannot hand in another's word, cards, or keys."""
    north, south = enrolled("north"), enrolled("south")
    with refused("PF501"):
        control(serving, north, "Decide", pb.DecideRequest(envelope=south.approval(plan)))
    with refused("PF501"):
        control(serving, north, "Decide", pb.DecideRequest(envelope=north.approval(plan, site="south")))
    assert store.approvals(plan) == []
    change = pb.RotateKeyRequest(site_card=south.card, continuity=seal_card_change(south.card, south.evidence))
    with refused("PF418"):
        control(serving, north, "RotateKey", change)


def test_a_revocation_counts_at_the_next_call_on_an_open_connection(serving, enrolled, refused):
    north, south = enrolled("north"), enrolled("south")
    with control_channel(serving, north) as channel:
        assert call(channel, "Control", "GetServerCard", CARD).server_card
        members.revoke(serving.root, NORTH)
        for method, request in (("GetServerCard", CARD), ("Renew", pb.RenewRequest(tls_csr_der=csr_of(new_key())))):
            with refused("PF415", UNAUTHENTICATED):
                call(channel, "Control", method, request)
    assert control(serving, south, "GetServerCard", CARD).server_card


def test_an_expiry_counts_on_an_open_connection_too(serving, enrolled, store, refused):
    with control_channel(serving, enrolled("north")) as channel:
        call(channel, "Control", "GetServerCard", CARD)
        with store._write() as connection:
            connection.exec_driver_sql(f"UPDATE certificate SET expires_at = {time.time() - 1}")
        with refused("PF415", UNAUTHENTICATED):
            call(channel, "Control", "GetServerCard", CARD)


# ---- certificates ----


def test_a_renewal_is_for_a_new_key_and_the_one_before_ends_soon_after_its_first_use(serving, enrolled, store, monkeypatch, refused):
    north = enrolled("north")
    control(serving, north, "GetServerCard", CARD)
    fresh = renewed(serving, north)
    assert control(serving, north, "GetServerCard", CARD).server_card
    monkeypatch.setattr(certificate_store, "SUCCESSION_S", 0.0)
    assert control(serving, fresh, "GetServerCard", CARD).server_card
    with refused("PF415", UNAUTHENTICATED):
        control(serving, north, "GetServerCard", CARD)
    assert store.audit_events()[-1].action == "certificate.renewed"


def test_the_one_before_is_taken_for_some_minutes_still(serving, enrolled):
    north = enrolled("north")
    fresh = renewed(serving, north)
    for peer in (fresh, north):
        assert control(serving, peer, "GetServerCard", CARD).server_card


def test_a_renewal_whose_reply_got_lost_gives_the_same_certificate_again(serving, enrolled, store):
    north, key = enrolled("north"), new_key()
    assert renewed(serving, north, key=key).certificate == renewed(serving, north, key=key).certificate
    assert len(store.certificates(NORTH)) == 2


def test_certificates_that_were_never_used_do_not_pile_up(serving, enrolled, store):
    north = enrolled("north")
    peers = [renewed(serving, north) for _ in range(4)]
    standing = {row.serial for row in store.certificates(NORTH) if row.stands(time.time())}
    newest = x509.load_pem_x509_certificate(peers[-1].certificate).serial_number
    assert len(standing) == 2
    assert f"{newest:x}" in standing


def test_a_key_that_has_a_certificate_gets_no_other(serving, enrolled, refused):
    north, south = enrolled("north"), enrolled("south")
    for key in (north.tls, south.tls):
        with refused("PF414"):
            control(serving, north, "Renew", pb.RenewRequest(tls_csr_der=csr_of(key)))


# ---- keys ----


def with_node_key(peer: Peer) -> Peer:
    return replace(peer, node_key=new_node_key())


def test_a_new_node_key_follows_from_the_evidence_key(serving, enrolled, store):
    north = enrolled("north")
    fresh = with_node_key(north)
    request = pb.RotateKeyRequest(site_card=fresh.card, continuity=seal_card_change(fresh.card, north.evidence))
    for _ in range(2):  # the same again changes nothing
        control(serving, north, "RotateKey", request)
    assert store.site(NORTH).flower_key == fresh.node_key
    assert serving.site_card(NORTH) == fresh.card
    assert [(key.kind, key.continuity is None) for key in store.site_keys(NORTH)] == [
        ("evidence", True),
        ("flower", True),
        ("flower", False),
    ]


def test_a_new_evidence_key_is_handed_over_by_the_old_one_and_both_stand_in_the_log(serving, enrolled, store, plan):
    north = enrolled("north")
    fresh = replace(north, evidence=SigningKey.generate())
    leaf = handed_over(NORTH, north.evidence, fresh.evidence, time.time())
    control(serving, north, "RotateKey", pb.RotateKeyRequest(site_card=fresh.card, rotation=leaf.to_bytes()))
    assert store.site(NORTH).evidence_key == fresh.evidence.public.to_text()
    assert [read_leaf(data) for data in store.log_leaves(0, 100) if isinstance(read_leaf(data), KeyRotated)] == [leaf]
    control(serving, fresh, "Decide", pb.DecideRequest(envelope=fresh.approval(plan)))
    assert [given.site for given in store.approvals(plan)] == ["north"]


@pytest.mark.parametrize(
    "kind", ["not handed over", "by another key", "of another card", "other site", "to come", "garbage", "used before"]
)
def test_a_change_of_keys_that_does_not_follow_is_refused_and_changes_nothing(serving, enrolled, store, refused, kind):
    north, other = enrolled("north"), enrolled("south")
    fresh = replace(north, evidence=other.evidence if kind == "used before" else SigningKey.generate())
    moved, now = with_node_key(north), time.time()
    request = {
        "not handed over": pb.RotateKeyRequest(site_card=fresh.card),
        "by another key": pb.RotateKeyRequest(site_card=moved.card, continuity=seal_card_change(moved.card, other.evidence)),
        "of another card": pb.RotateKeyRequest(site_card=moved.card, continuity=seal_card_change(north.card, north.evidence)),
        "other site": pb.RotateKeyRequest(
            site_card=fresh.card, rotation=handed_over(other.name, north.evidence, fresh.evidence, now).to_bytes()
        ),
        "to come": pb.RotateKeyRequest(
            site_card=fresh.card, rotation=handed_over(NORTH, north.evidence, fresh.evidence, now + 9999).to_bytes()
        ),
        "garbage": pb.RotateKeyRequest(site_card=b"\xff" * 100, rotation=b"\x00", continuity=b"{}"),
        "used before": pb.RotateKeyRequest(
            site_card=fresh.card, rotation=handed_over(NORTH, north.evidence, fresh.evidence, now).to_bytes()
        ),
    }[kind]
    with refused("PF418", grpc.StatusCode.FAILED_PRECONDITION):
        control(serving, north, "RotateKey", request)
    assert SiteCard.from_bytes(serving.site_card(NORTH)) == SiteCard.from_bytes(north.card)
    assert store.site(NORTH).evidence_key == north.evidence.public.to_text()
    assert len(store.site_keys(NORTH)) == 2


def test_an_old_key_does_not_come_back(serving, enrolled, refused):
    north = enrolled("north")
    fresh = with_node_key(north)
    change = pb.RotateKeyRequest(site_card=fresh.card, continuity=seal_card_change(fresh.card, north.evidence))
    control(serving, north, "RotateKey", change)
    back = pb.RotateKeyRequest(site_card=north.card, continuity=seal_card_change(north.card, north.evidence))
    with refused("PF418"):  # a replay of what was true once
        control(serving, north, "RotateKey", back)


def test_the_keys_stay_while_a_run_is_going(serving, enrolled, store, plan, refused):
    north = enrolled("north")
    store.create_run(RunName("run-1"), plan_digest=plan, sites=[NORTH], at=1.0)
    fresh = replace(north, evidence=SigningKey.generate())
    request = pb.RotateKeyRequest(site_card=fresh.card, rotation=handed_over(NORTH, north.evidence, fresh.evidence, time.time()).to_bytes())
    with refused("PF418"):
        control(serving, north, "RotateKey", request)
    moved = with_node_key(north)
    move = pb.RotateKeyRequest(site_card=moved.card, continuity=seal_card_change(moved.card, north.evidence))
    with refused("PF418"):  # the round loop sends to the node key that it began with
        control(serving, north, "RotateKey", move)
    store.begin_attempt(RunName("run-1"), at=1.5)
    with refused("PF418"):
        control(serving, north, "RotateKey", move)
    store.stop_run(RunName("run-1"), at=2.0)
    control(serving, north, "RotateKey", move)
    with refused("PF418"):  # the rotation's card is of the node key before
        control(serving, north, "RotateKey", pb.RotateKeyRequest(site_card=fresh.card, rotation=b""))
    after = replace(fresh, node_key=moved.node_key)
    control(serving, north, "RotateKey", pb.RotateKeyRequest(site_card=after.card, rotation=request.rotation))
    assert store.site(NORTH).evidence_key == fresh.evidence.public.to_text()


# ---- plans, words, reports, the log ----


def test_a_site_gets_every_plan_and_its_word_is_recorded_once(serving, enrolled, plan, store):
    north = enrolled("north")
    (signed,) = control(serving, north, "ListPlans", pb.ListPlansRequest()).signed_plans
    assert open_plan(signed, serving.evidence_key.public).digest == plan
    for _ in range(2):
        control(serving, north, "Decide", pb.DecideRequest(envelope=north.approval(plan)))
    assert [given.envelope for given in store.approvals(plan)] == [north.approval(plan)]
    told = [(event.actor, event.action) for event in store.audit_events() if event.action == "plan.approved"]
    assert told == [("site:north", "plan.approved")]


def test_a_word_on_no_plan_or_none_at_all_is_refused(serving, enrolled, refused):
    north = enrolled("north")
    with refused("PF516", grpc.StatusCode.NOT_FOUND):
        control(serving, north, "Decide", pb.DecideRequest(envelope=north.approval("sha256:" + "0" * 64)))
    with refused("PF602", grpc.StatusCode.INVALID_ARGUMENT):
        control(serving, north, "Decide", pb.DecideRequest(envelope=b"no envelope"))


def test_what_a_site_reports_is_what_the_operator_sees(serving, enrolled):
    north = enrolled("north")
    before = time.time()
    reply = control(serving, north, "Report", pb.ReportRequest(software="0.1.0", state="running"))
    assert before <= reply.now <= time.time()
    assert reply.certificate_until == x509.load_pem_x509_certificate(north.certificate).not_valid_after_utc.timestamp()
    assert (reply.log_size, reply.renew) == (1, False)
    control(serving, north, "Report", pb.ReportRequest(software="0.2.0", state="stopped"))
    (row,) = members.site_rows(serving.root)
    assert (row["site"], row["reports"], row["software"]) == ("north", "stopped", "0.2.0")
    assert row["certificate_until_at"] == reply.certificate_until


def test_a_site_is_told_what_became_of_its_rounds_and_of_no_other_sites(serving, enrolled):
    north, south = enrolled("north"), enrolled("south")
    asked = pb.ReportRequest(software="0.1.0", state="running")
    assert not control(serving, north, "Report", asked).outcomes
    with SqlStore(serving.database_url) as store:
        state = digest.of_bytes(b"state")
        plan = digest.of_bytes(b"plan")
        store.add_plan(plan, name="p", canonical=b"{}", signed=b"s", at=1.0)
        store.create_run(RunName("run-9"), plan_digest=plan, sites=[SiteName("north")], at=1.0)
        store.begin_attempt(RunName("run-9"), at=1.0)
        first = Checkpoint(
            round_index=0, state=state, state_path="s", state_bytes=1, optimiser=state, optimiser_path="o", optimiser_bytes=1
        )
        store.commit_initial(RunName("run-9"), 1, first, at=1.0)
        row = Participation(site=SiteName("north"), state=ParticipationState.OFFERED, offered_at=1.0)
        opening = RoundOpening(
            run=RunName("run-9"), attempt=1, round_index=1, base_state=state, participations=(row,), offered_at=1.0, deadline=2.0
        )
        store.open_round(opening)
        refused = replace(row, state=ParticipationState.REFUSED, code="PF508")
        store.note_participation(RunName("run-9"), 1, 1, refused, at=1.5)
        store.suspend_sites(RunName("run-9"), 1, after=1, at=1.6)
    told = control(serving, north, "Report", asked)
    (outcome,) = told.outcomes
    assert (outcome.run, outcome.round, outcome.state, outcome.code, outcome.offered_at) == ("run-9", 1, "refused", "PF508", 1.0)
    assert told.suspended
    other = control(serving, south, "Report", asked)
    assert (list(other.outcomes), other.suspended) == ([], False)


@pytest.mark.parametrize("fields", [{"state": "dancing"}, {"state": ""}, {"software": "<b>"}, {"software": "x" * 41}])
def test_a_report_holds_what_it_may_and_nothing_else(serving, enrolled, refused, fields):
    with refused("PF416", grpc.StatusCode.INVALID_ARGUMENT):
        control(serving, enrolled("north"), "Report", pb.ReportRequest(**{"software": "1", "state": "running", **fields}))


def test_a_site_reads_the_log_and_cosigns_it(serving, enrolled, store, refused):
    north = enrolled("north")
    (leaf,) = control(serving, north, "GetLeaves", pb.GetLeavesRequest(start=0, stop=10)).leaves
    reply = control(serving, north, "GetCheckpoint", pb.GetCheckpointRequest())
    found = open_checkpoint(Note.from_bytes(reply.note), log_key(origin_of("test"), serving.evidence_key.public))
    shown = control(serving, north, "GetInclusion", pb.GetInclusionRequest(leaf_hash=leaf_hash(leaf), size=found.size))
    assert verify_inclusion(leaf=leaf_hash(leaf), index=shown.index, size=found.size, proof=list(shown.proof), root=found.root)
    line = cosign_checkpoint(found, NORTH, north.evidence, at=int(time.time())).to_line().encode()
    control(serving, north, "Cosign", pb.CosignRequest(size=found.size, line=line))
    assert [given.site for given in store.cosignatures(10)] == ["north"]
    for code, request in (("PF611", pb.CosignRequest(size=found.size, line=b"x")), ("PF609", pb.CosignRequest(size=99, line=line))):
        with refused(code):
            control(serving, north, "Cosign", request)
    for code, asked in (("PF416", b"short"), ("PF610", bytes(32))):
        with refused(code):
            control(serving, north, "GetInclusion", pb.GetInclusionRequest(leaf_hash=asked, size=1))


# ---- the authority ----


def test_a_rotation_of_the_authority_locks_nobody_out_and_ends_when_all_have_renewed(serving, enrolled, refused):
    north, old = enrolled("north"), serving.ca_file.read_bytes()
    members.rotate_authority(serving.root)
    assert control(serving, north, "Report", pb.ReportRequest(software="1", state="running")).renew
    with pytest.raises(Exception, match=r"PF420.*north"):
        members.finish_rotation(serving.root, leave_behind=False)
    # Who trusts the old one alone still reaches the server, and what it gets leads to both.
    with control_channel(serving, north, authorities=old) as channel:
        fresh_key = new_key()
        reply = call(channel, "Control", "Renew", pb.RenewRequest(tls_csr_der=csr_of(fresh_key)))
    fresh = replace(north, tls=fresh_key, certificate=reply.certificate_pem)
    assert len(x509.load_pem_x509_certificates(reply.ca_pem)) == 2
    with control_channel(serving, fresh, authorities=reply.ca_pem) as channel:
        assert not call(channel, "Control", "Report", pb.ReportRequest(software="1", state="running")).renew
    state = members.finish_rotation(serving.root, leave_behind=False)
    assert (state["rotating"], state["sites_without_the_new_authority"]) == (False, [])
    with control_channel(serving, fresh, authorities=reply.ca_pem) as channel:
        assert call(channel, "Control", "GetServerCard", CARD).server_card == serving.card_file.read_bytes()
    with refused(None, grpc.StatusCode.UNAVAILABLE):  # the old authority counts no more, in both directions
        control(serving, north, "GetServerCard", CARD)
    with control_channel(serving, fresh, authorities=old) as channel, refused(None, grpc.StatusCode.UNAVAILABLE):
        call(channel, "Control", "GetServerCard", CARD)


def test_a_renewed_server_certificate_is_served_to_new_connections_without_a_restart(serving, enrolled):
    north = enrolled("north")
    members.renew_server(serving.root)
    assert control(serving, north, "GetServerCard", CARD).server_card
    assert enroll(serving, north.request(members.invite(serving.root, SiteName("north"), hours=1).text)).state
