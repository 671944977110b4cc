"""Invitations, enrolments, certificates, keys and operators: one contract, on SQLite and on PostgreSQL."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import psycopg
import pytest

from pathfed_common import digest
from pathfed_common.errors import PathfedError, RoundError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.documents import SiteCard
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_leaves import SiteAdmitted, read_leaf, rotate_key
from pathfed_common.units import UtcSeconds
from pathfed_server.db.certificate_store import SUCCESSION_S
from pathfed_server.db.rows import CertificateRow, EnrolmentRow, SiteReportRow
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds.state import SiteState

NORTH, SOUTH = SiteName("north"), SiteName("south")
BY = "operator:ann"
KEY = SigningKey.generate()


def hash_of(text: str) -> digest.Digest:
    return digest.of_bytes(text.encode())


def asked(name: SiteName = NORTH, *, invitation: str = "secret", key: SigningKey = KEY, node: str = "node") -> EnrolmentRow:
    card = SiteCard(site=name, evidence_key=key.public, flower_key=f"{node} of {name}").to_bytes(key)
    return EnrolmentRow(
        invitation=hash_of(invitation), site=name, site_card=card, tls_csr=b"csr", software="1", state="pending", asked_at=20.0
    )


def issued(serial: str, name: SiteName = NORTH, *, key: str = "", expires: float = 1000.0) -> CertificateRow:
    return CertificateRow(
        serial=serial,
        site=name,
        tls_key=hash_of(key or serial),
        fingerprint=hash_of(f"certificate {serial}"),
        issuer=hash_of("ca"),
        pem=b"pem",
        issued_at=30.0,
        expires_at=expires,
    )


@pytest.fixture
def admitted(store: SqlStore) -> SqlStore:
    """A store in which north is enrolled, with certificate a1."""
    store.add_invitation(hash_of("secret"), NORTH, expires_at=100.0, at=10.0, by=BY)
    row = store.ask(asked(), at=20.0)
    store.admit(row, issued("a1"), at=30.0, by=BY)
    return store


def refused(code: str, action: Callable[[], object]) -> None:
    with pytest.raises(PathfedError) as caught:
        action()
    assert caught.value.code.value == code


def test_an_admission_adds_site_keys_certificate_and_leaf_in_one(admitted: SqlStore) -> None:
    site = admitted.site(NORTH)
    assert (site.state, site.enrolled_at, site.evidence_key) == (SiteState.ENROLLED, 30.0, KEY.public.to_text())
    assert [(key.kind, key.continuity) for key in admitted.site_keys(NORTH)] == [("evidence", None), ("flower", None)]
    (row,) = admitted.enrolments()
    assert (row.state, row.decided_at, row.serial) == ("admitted", 30.0, "a1")
    assert admitted.caller("a1") == (site, admitted.certificate("a1"))
    assert read_leaf(admitted.log_leaves(0, 9)[0]) == SiteAdmitted(site=NORTH, evidence_key=KEY.public, at=UtcSeconds(30.0))
    assert [event.actor for event in admitted.audit_events()] == [BY, "invited:north", BY, BY]


def test_an_admission_that_fails_leaves_nothing(store: SqlStore) -> None:
    store.add_invitation(hash_of("secret"), NORTH, expires_at=100.0, at=10.0, by=BY)
    row = store.ask(asked(), at=20.0)
    store.add_site(SOUTH, evidence_key=SigningKey.generate().public.to_text(), flower_key=f"node of {NORTH}", at=25.0)
    refused("PF502", lambda: store.admit(row, issued("a1"), at=30.0, by=BY))
    assert [site.name for site in store.sites()] == [SOUTH]
    assert store.certificates() == []
    assert store.pending(NORTH) == row
    assert store.log_size() == 1


def test_requests_at_once_with_one_invitation_become_one(url: str, store: SqlStore) -> None:
    store.add_invitation(hash_of("secret"), NORTH, expires_at=100.0, at=10.0, by=BY)
    rows = [asked(key=SigningKey.generate()) for _ in range(4)]
    outcomes: list[str] = []

    def ask(row: EnrolmentRow) -> None:
        try:
            with SqlStore(url) as own:
                own.ask(row, at=20.0)
            outcomes.append("taken")
        except TransportError as error:
            outcomes.append(error.code.value)

    threads = [threading.Thread(target=ask, args=[row]) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["PF412", "PF412", "PF412", "taken"]
    assert len(store.enrolments("pending")) == 1


def test_invitations_end_by_time_by_use_and_by_the_next_one(store: SqlStore) -> None:
    store.add_invitation(hash_of("secret"), NORTH, expires_at=100.0, at=10.0, by=BY)
    refused("PF412", lambda: store.ask(asked(invitation="another"), at=20.0))
    refused("PF412", lambda: store.ask(asked(), at=100.0))
    refused("PF413", lambda: store.ask(asked(SOUTH), at=20.0))
    store.add_invitation(hash_of("next"), NORTH, expires_at=100.0, at=11.0, by=BY)
    refused("PF412", lambda: store.ask(asked(), at=20.0))
    store.ask(asked(invitation="next"), at=20.0)
    assert store.ask(asked(invitation="next"), at=500.0).state == "pending"
    store.add_invitation(hash_of("third"), NORTH, expires_at=100.0, at=12.0, by=BY)
    assert [row.withdrawn_at for row in store.invitations()] == [11.0, None, None]


def test_a_decision_is_made_once(admitted: SqlStore) -> None:
    refused("PF521", lambda: admitted.pending(NORTH))
    refused("PF521", lambda: admitted.refuse(NORTH, at=40.0, by=BY))
    refused("PF521", lambda: admitted.admit(asked(), issued("a2"), at=40.0, by=BY))
    assert len(admitted.certificates()) == 1


def test_a_revocation_ends_certificates_invitations_and_what_is_pending(admitted: SqlStore) -> None:
    admitted.renew(issued("a2"), holds="a1", at=40.0)
    admitted.add_invitation(hash_of("again"), NORTH, expires_at=100.0, at=41.0, by=BY)
    admitted.ask(replace(asked(invitation="again"), tls_csr=b"other"), at=42.0)
    admitted.revoke_site(NORTH, at=50.0, by=BY)
    assert [row.stands(50.0) for row in admitted.certificates()] == [False, False]
    assert admitted.enrolments("pending") == []
    refused("PF518", lambda: admitted.add_invitation(hash_of("more"), NORTH, expires_at=100.0, at=51.0, by=BY))
    event = admitted.audit_events()[-1]
    assert (event.actor, event.action) == (BY, "site.revoked")


def test_a_renewal_again_gives_the_same_and_a_key_of_another_is_refused(admitted: SqlStore) -> None:
    first = admitted.renew(issued("a2", key="k"), holds="a1", at=40.0)
    assert admitted.renew(issued("a3", key="k"), holds="a1", at=41.0).serial == first.serial == "a2"
    refused("PF414", lambda: admitted.renew(issued("a4", key="a1"), holds="a1", at=42.0))
    admitted.add_site(SOUTH, evidence_key=SigningKey.generate().public.to_text(), flower_key="f", at=43.0)
    refused("PF414", lambda: admitted.renew(issued("b1", SOUTH, key="k"), holds="b0", at=44.0))


def test_the_first_use_of_a_certificate_ends_those_before_it(admitted: SqlStore) -> None:
    admitted.renew(issued("a2"), holds="a1", at=40.0)
    admitted.note_first_use(admitted.certificate("a2"), at=50.0)
    admitted.note_first_use(admitted.certificate("a2"), at=90.0)
    old, new = admitted.certificate("a1"), admitted.certificate("a2")
    assert (old.revoked_at, new.first_used_at, new.revoked_at) == (50.0 + SUCCESSION_S, 50.0, None)
    assert old.stands(50.0 + SUCCESSION_S - 1)
    assert not old.stands(50.0 + SUCCESSION_S)


def test_of_certificates_that_were_never_used_the_last_alone_stands(admitted: SqlStore) -> None:
    for serial in ("a2", "a3", "a4"):
        admitted.renew(issued(serial), holds="a1", at=40.0)
    assert [row.serial for row in admitted.certificates() if row.stands(41.0)] == ["a1", "a4"]


def test_a_serial_that_nobody_issued_is_nobodys(admitted: SqlStore) -> None:
    assert admitted.caller("ffff") is None
    with pytest.raises(LookupError):
        admitted.certificate("ffff")


def test_a_rotation_counts_against_the_site_as_it_was(admitted: SqlStore) -> None:
    before, fresh = admitted.site(NORTH), SigningKey.generate()
    card = SiteCard(site=NORTH, evidence_key=fresh.public, flower_key=before.flower_key)
    leaf = rotate_key(NORTH, KEY, fresh, UtcSeconds(60.0))
    admitted.rotate_keys(card, before=before, continuity=leaf.to_bytes(), leaf=leaf, at=60.0)
    assert admitted.site(NORTH).evidence_key == fresh.public.to_text()
    assert admitted.site_keys(NORTH)[-1].continuity == leaf.to_bytes()
    size = admitted.log_size()
    refused("PF418", lambda: admitted.rotate_keys(card, before=before, continuity=b"", leaf=leaf, at=61.0))
    back = SiteCard(site=NORTH, evidence_key=KEY.public, flower_key=before.flower_key)
    refused("PF418", lambda: admitted.rotate_keys(back, before=admitted.site(NORTH), continuity=b"", leaf=None, at=62.0))
    assert admitted.log_size() == size


def test_a_key_that_a_site_ever_had_is_no_other_sites(admitted: SqlStore) -> None:
    before = admitted.site(NORTH)
    card = SiteCard(site=NORTH, evidence_key=KEY.public, flower_key="another")
    admitted.rotate_keys(card, before=before, continuity=b"c", leaf=None, at=60.0)
    fresh = SigningKey.generate().public.to_text()
    with pytest.raises(RoundError, match="PF502"):
        admitted.add_site(SOUTH, evidence_key=fresh, flower_key=before.flower_key, at=61.0)


def test_the_last_report_of_a_site_is_kept(admitted: SqlStore) -> None:
    for state, at in (("running", 50.0), ("stopped", 51.0)):
        admitted.note_report(SiteReportRow(site=NORTH, software="1", state=state, reported_at=at))
    assert admitted.reports() == {NORTH: SiteReportRow(site=NORTH, software="1", state="stopped", reported_at=51.0)}


def test_operators_keep_their_names_and_one_admin_stays(store: SqlStore) -> None:
    refused("PF523", lambda: store.add_operator("otto", role="operator", key="k1", at=1.0, by="operator"))
    store.add_operator("ann", role="admin", key="k1", at=1.0, by="operator")
    store.add_operator("otto", role="operator", key="k2", at=2.0, by=BY)
    refused("PF524", lambda: store.add_operator("otto", role="auditor", key="k3", at=3.0, by=BY))
    refused("PF524", lambda: store.add_operator("ada", role="auditor", key="k2", at=3.0, by=BY))
    refused("PF523", lambda: store.remove_operator("ann", at=4.0, by=BY))
    refused("PF522", lambda: store.remove_operator("ada", at=4.0, by=BY))
    for at in (5.0, 6.0):
        store.remove_operator("otto", at=at, by=BY)
    assert [(row.name, row.role, row.removed_at) for row in store.operators()] == [("ann", "admin", None), ("otto", "operator", 5.0)]


def test_two_admins_do_not_remove_each_other_at_once(url: str, store: SqlStore) -> None:
    store.add_operator("ann", role="admin", key="k1", at=1.0, by="operator")
    store.add_operator("ben", role="admin", key="k2", at=1.0, by=BY)
    codes: list[str | None] = []

    def remove(name: str) -> None:
        try:
            with SqlStore(url) as own:
                own.remove_operator(name, at=2.0, by="operator:x")
            codes.append(None)
        except RoundError as error:
            codes.append(error.code.value)

    threads = [threading.Thread(target=remove, args=[name]) for name in ("ann", "ben")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes, key=str) == [None, "PF523"] or sorted(codes, key=str) == ["PF523", None]


def renew(store: SqlStore) -> None:
    store.renew(issued("a2"), holds="a1", at=40.0)


def use(store: SqlStore) -> None:
    store.note_first_use(store.certificate("a1"), at=40.0)


def move(store: SqlStore) -> None:
    card = SiteCard(site=NORTH, evidence_key=KEY.public, flower_key="another")
    store.rotate_keys(card, before=store.site(NORTH), continuity=b"c", leaf=None, at=40.0)


def admit_again(store: SqlStore) -> None:
    store.admit(store.pending(NORTH), issued("a3"), at=40.0, by=BY)


OWN_ROW = "SELECT 1 FROM site WHERE name = 'north' FOR UPDATE"


@pytest.mark.parametrize(
    ("first", "then", "action"),
    [
        (OWN_ROW, "UPDATE certificate SET revoked_at = 50", renew),
        (OWN_ROW, "UPDATE certificate SET revoked_at = 50", use),
        (OWN_ROW, "UPDATE enrolment SET software = '2' WHERE state = 'pending'", admit_again),
        ("LOCK TABLE site IN SHARE ROW EXCLUSIVE MODE", "LOCK TABLE site_key IN ROW EXCLUSIVE MODE", move),
    ],
    ids=["renewal and revocation", "first use and revocation", "admission and revocation", "new key and enrolment"],
)
@pytest.mark.parametrize("backend", ["postgresql"])
def test_locks_are_taken_in_one_order(admitted: SqlStore, url: str, first: str, then: str, action: Callable[[SqlStore], None]) -> None:
    """Another transaction takes the first lock; `action` then waits for it, and holds nothing that the other goes on to take."""
    admitted.add_invitation(hash_of("again"), NORTH, expires_at=100.0, at=31.0, by=BY)
    admitted.ask(asked(invitation="again"), at=32.0)
    failed: list[BaseException] = []

    def act() -> None:
        try:
            with SqlStore(url) as own:
                action(own)
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=act)
    with psycopg.connect(url, autocommit=True) as watching, psycopg.connect(url) as holding:
        holding.execute(first.encode())
        other.start()
        waits = b"SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        while watching.execute(waits).fetchone() is None:
            assert other.is_alive(), failed
            time.sleep(0.01)
        holding.execute(b"SET LOCAL lock_timeout = '5s'")
        holding.execute(then.encode())
        holding.rollback()
    other.join(60)
    assert not failed


def test_a_revoked_site_renews_nothing(admitted: SqlStore) -> None:
    admitted.revoke_site(NORTH, at=35.0, by=BY)
    refused("PF415", lambda: renew(admitted))
