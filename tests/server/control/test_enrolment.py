"""From an invitation to a certificate, and every way in which somebody else might try."""

import sqlite3
import time
from dataclasses import replace

import grpc
import pytest
from control_peer import Peer, control, csr_of, enroll, new_key
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from pathfed_common.errors import RoundError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol.invitation import Invitation, ca_pin, secret_hash
from pathfed_server import members
from pathfed_server.rounds.state import SiteState

NORTH, SOUTH = SiteName("north"), SiteName("south")
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def invited(home, name=NORTH, hours=1.0) -> str:
    return members.invite(home.root, name, hours=hours).text


def test_a_site_goes_from_an_invitation_to_a_certificate(serving, store):
    north, invitation = Peer.make("north"), invited(serving)
    assert enroll(serving, north.request(invitation)).state == pb.EnrollReply.State.PENDING
    ((row, fingerprint),) = members.pending(serving.root)
    assert (row.site, fingerprint) == ("north", north.fingerprint)
    members.admit(serving.root, NORTH, north.fingerprint.upper())
    reply = enroll(serving, north.request(invitation))
    assert reply.state == pb.EnrollReply.State.ADMITTED
    assert reply.ca_pem == serving.ca_file.read_bytes()
    assert (
        control(serving, north.certified(reply), "GetServerCard", pb.GetServerCardRequest()).server_card == serving.card_file.read_bytes()
    )
    site = store.site(NORTH)
    assert (site.state, site.evidence_key, site.flower_key) == (SiteState.ENROLLED, north.evidence.public.to_text(), north.node_key)
    assert serving.site_card(NORTH) == north.card
    assert [key.kind for key in store.site_keys(NORTH)] == ["evidence", "flower"]


def test_the_certificate_is_short_lived_for_clients_and_names_the_site_alone(serving, enrolled):
    found = x509.load_pem_x509_certificate(enrolled("north").certificate)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["spiffe://test/site/north"]
    assert list(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert 29 <= (found.not_valid_after_utc - found.not_valid_before_utc).days <= 30


def test_nothing_of_a_request_but_its_key_gets_into_the_certificate(serving, store):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "south")])
    north, invitation = Peer.make("north"), invited(serving)
    north = replace(north, csr=csr_of(north.tls, name))
    enroll(serving, north.request(invitation))
    members.admit(serving.root, NORTH, north.fingerprint)
    found = x509.load_pem_x509_certificate(enroll(serving, north.request(invitation)).certificate_pem)
    assert found.subject.rfc4514_string() == "CN=north"


def test_the_same_request_again_gives_the_present_state_and_adds_nothing(serving, store):
    north, invitation = Peer.make("north"), invited(serving)
    for _ in range(3):
        assert enroll(serving, north.request(invitation)).state == pb.EnrollReply.State.PENDING
    members.admit(serving.root, NORTH, north.fingerprint)
    replies = [enroll(serving, north.request(invitation)) for _ in range(2)]
    assert replies[0] == replies[1]
    assert len(store.enrolments()) == len(store.certificates()) == 1


def test_a_refused_site_is_told_so_and_its_invitation_is_used_up(serving, store, refused):
    north, invitation = Peer.make("north"), invited(serving)
    enroll(serving, north.request(invitation))
    members.refuse(serving.root, NORTH)
    reply = enroll(serving, north.request(invitation))
    assert (reply.state, reply.certificate_pem) == (pb.EnrollReply.State.REFUSED, b"")
    with refused("PF412", UNAUTHENTICATED):
        enroll(serving, Peer.make("north").request(invitation))
    assert store.sites() == []
    with pytest.raises(RoundError, match="PF521"):
        members.admit(serving.root, NORTH, north.fingerprint)


def test_a_token_works_once(serving, refused):
    invitation = invited(serving)
    enroll(serving, Peer.make("north").request(invitation))
    with refused("PF412", UNAUTHENTICATED):
        enroll(serving, Peer.make("north").request(invitation))


def test_a_stolen_token_that_is_used_first_shows_in_the_fingerprint(serving, store, refused):
    thief, north, invitation = Peer.make("north"), Peer.make("north"), invited(serving)
    enroll(serving, thief.request(invitation))
    with refused("PF412", UNAUTHENTICATED):  # the hospital notices, too
        enroll(serving, north.request(invitation))
    with pytest.raises(TransportError, match="PF421"):
        members.admit(serving.root, NORTH, north.fingerprint)
    assert store.sites() == []


@pytest.mark.parametrize("part", ["tls", "evidence", "node_key"])
def test_each_key_that_somebody_exchanged_on_the_way_shows_in_the_fingerprint(part):
    north, other = Peer.make("north"), Peer.make("north")
    changed = {
        "tls": replace(north, tls=other.tls, csr=other.csr),
        "evidence": replace(north, evidence=other.evidence),
        "node_key": replace(north, node_key=other.node_key),
    }[part]
    assert changed.fingerprint != north.fingerprint


def test_an_expired_token_lets_nobody_in_but_a_request_in_time_goes_on(serving, refused):
    north, in_time, late = Peer.make("north"), invited(serving), invited(serving, SOUTH)
    enroll(serving, north.request(in_time))
    with sqlite3.connect(serving.root / "pathfed.db") as database:
        database.execute("UPDATE invitation SET expires_at = ?", (time.time() - 1,))
    database.close()
    with refused("PF412", UNAUTHENTICATED):
        enroll(serving, Peer.make("south").request(late))
    members.admit(serving.root, NORTH, north.fingerprint)
    assert enroll(serving, north.request(in_time)).state == pb.EnrollReply.State.ADMITTED


def test_a_token_of_another_server_or_nobodys_is_worth_nothing(serving, refused):
    with refused("PF412", UNAUTHENTICATED):
        enroll(serving, pb.EnrollRequest(secret=bytes(32), site_card=Peer.make("north").card, tls_csr_der=csr_of(new_key()), software="1"))


def test_a_token_is_for_its_site_alone(serving, store, refused):
    invitation = invited(serving)
    with refused("PF413", INVALID):
        enroll(serving, Peer.make("south").request(invitation))
    assert store.enrolments() == []
    assert enroll(serving, Peer.make("north").request(invitation)).state == pb.EnrollReply.State.PENDING


def test_a_newer_invitation_replaces_an_unused_one(serving, refused):
    first, second = invited(serving), invited(serving)
    with refused("PF412", UNAUTHENTICATED):
        enroll(serving, Peer.make("north").request(first))
    assert enroll(serving, Peer.make("north").request(second)).state == pb.EnrollReply.State.PENDING


def test_only_the_hash_of_a_secret_is_kept_and_nothing_of_it_shows(serving, store):
    made = members.invite(serving.root, NORTH, hours=1)
    secret = Invitation.from_text(made.text).secret
    assert made.text not in repr(made)
    enroll(serving, Peer.make("north").request(made.text))
    stored = b"".join(path.read_bytes() for path in serving.root.rglob("*") if path.is_file())
    assert not any(form in stored for form in (secret, secret.hex().encode(), made.text[20:60].encode()))
    assert secret_hash(secret).encode() in stored


def test_the_invitation_pins_the_authority_that_the_port_shows(serving):
    pin = Invitation.from_text(invited(serving)).ca_pin
    assert pin == ca_pin(serving.ca_file.read_bytes())
    chain = x509.load_pem_x509_certificates(serving.tls_certificate.read_bytes())
    assert chain[-1] == x509.load_pem_x509_certificate(serving.ca_file.read_bytes())


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("site_card", b"", "PF413"),
        ("site_card", b"{}", "PF413"),
        ("site_card", b"x" * 20_000, "PF416"),
        ("secret", b"", "PF416"),
        ("secret", bytes(33), "PF416"),
        ("tls_csr_der", b"", "PF414"),
        ("tls_csr_der", b"x" * 5000, "PF416"),
        ("software", "", "PF416"),
        ("software", "<script>", "PF416"),
        ("software", "../../etc/passwd", "PF416"),
        ("software", "x" * 41, "PF416"),
        ("software", "1\n2", "PF416"),
    ],
)
def test_a_field_that_is_not_what_it_must_be_is_refused_and_uses_nothing_up(serving, refused, name, value, code):
    north, invitation = Peer.make("north"), invited(serving)
    request = north.request(invitation)
    setattr(request, name, value)
    with refused(code, INVALID):
        enroll(serving, request)
    assert enroll(serving, north.request(invitation)).state == pb.EnrollReply.State.PENDING


def test_a_card_with_a_node_key_of_another_kind_is_refused(serving, refused):
    north = replace(Peer.make("north"), node_key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGl5 x")
    with refused("PF413", INVALID):
        enroll(serving, north.request(invited(serving)))


def test_a_request_must_be_signed_by_its_own_key_on_a_curve_that_we_know(serving, refused):
    broken = bytearray(csr_of(new_key()))
    broken[-1] ^= 1
    for csr in (bytes(broken), csr_of(ec.generate_private_key(ec.SECP521R1())), b"\x30\x03\x02\x01\x00"):
        with refused("PF414", INVALID):
            enroll(serving, replace(Peer.make("north"), csr=csr).request(invited(serving)))


def test_a_tls_key_is_certified_once(serving, enrolled):
    north = enrolled("north")
    south = replace(Peer.make("south"), tls=north.tls, csr=csr_of(north.tls))
    enroll(serving, south.request(invited(serving, SOUTH)))
    with pytest.raises(TransportError, match="PF414"):
        members.admit(serving.root, SOUTH, south.fingerprint)


def test_a_name_or_key_that_another_site_has_is_not_admitted(serving, enrolled, store):
    north = enrolled("north")
    impostor = Peer.make("north")
    enroll(serving, impostor.request(invited(serving)))
    with pytest.raises(RoundError, match="PF502"):
        members.admit(serving.root, NORTH, impostor.fingerprint)
    twin = replace(Peer.make("south"), evidence=north.evidence)
    enroll(serving, twin.request(invited(serving, SOUTH)))
    with pytest.raises(RoundError, match="PF502"):
        members.admit(serving.root, SOUTH, twin.fingerprint)
    assert store.site(NORTH).evidence_key == north.evidence.public.to_text()
    assert serving.site_card(NORTH) == north.card
    assert not serving.site_card_file(SOUTH).exists()


def test_a_site_whose_certificate_has_ended_comes_back_with_its_own_keys(serving, enrolled, store):
    north = enrolled("north")
    fresh = replace(north, tls=new_key())
    fresh = replace(fresh, csr=csr_of(fresh.tls))
    invitation = invited(serving)
    enroll(serving, fresh.request(invitation))
    members.admit(serving.root, NORTH, fresh.fingerprint)
    again = fresh.certified(enroll(serving, fresh.request(invitation)))
    assert control(serving, again, "ListPlans", pb.ListPlansRequest()).signed_plans == []
    assert len(store.sites()) == 1


def test_a_revoked_site_is_neither_invited_nor_let_in_again(serving, enrolled, store):
    north = enrolled("north")
    later = replace(north, tls=new_key())
    later = replace(later, csr=csr_of(later.tls))
    invitation = invited(serving)
    enroll(serving, later.request(invitation))
    members.revoke(serving.root, NORTH)
    assert enroll(serving, later.request(invitation)).state == pb.EnrollReply.State.REFUSED
    with pytest.raises(RoundError, match="PF518"):
        invited(serving)
    with pytest.raises(RoundError, match="PF521"):
        members.admit(serving.root, NORTH, later.fingerprint)


def test_after_its_revocation_a_site_is_told_refused_and_gets_no_certificate(serving, store):
    north, invitation = Peer.make("north"), invited(serving)
    enroll(serving, north.request(invitation))
    members.admit(serving.root, NORTH, north.fingerprint)
    members.revoke(serving.root, NORTH)
    reply = enroll(serving, north.request(invitation))
    assert (reply.state, reply.certificate_pem) == (pb.EnrollReply.State.REFUSED, b"")


def test_who_invited_asked_and_admitted_stands_in_the_audit_trail(serving, enrolled, store):
    enrolled("north")
    told = [(event.actor, event.action) for event in store.audit_events()]
    assert told == [
        ("operator", "site.invited"),
        ("invited:north", "site.asked"),
        ("operator", "site.enrolled"),
        ("operator", "site.admitted"),
    ]
