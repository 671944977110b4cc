"""The site's side against the real server's control plane: two sites, from invitations to a log that both have cosigned."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from real_control import RealServer, Site, serving_in

from pathfed_client.control.agent import PASSES
from pathfed_client.control.rotating import rotate
from pathfed_client.egress.entry import EgressKind
from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome
from pathfed_client.io.site_keys import KeyKind, fingerprints
from pathfed_client.transport.relay_certificate import make_certificate
from pathfed_common.errors import PathfedError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.processes import accepts_connections, free_port
from pathfed_common.provenance.log_leaves import KeyRotated, PlanApproved, SiteAdmitted, read_leaf
from pathfed_server import members


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RealServer]:
    with serving_in(tmp_path_factory.mktemp("real") / "server") as running:
        yield running


@pytest.fixture
def make(server, tmp_path) -> Iterator[Callable[[str], Site]]:
    made: list[Site] = []

    def enrolled(name: str) -> Site:
        made.append(server.enrolled(tmp_path / name, name))
        return made[-1]

    yield enrolled
    for site in made:
        site.close()
        server.revoke_if_enrolled(site.home.name)


def test_two_sites_enrol_approve_and_cosign_with_a_quorum(server, make, tmp_path):
    north, south = make("north"), make("south")
    plan = server.publish(tmp_path, "one")
    for site in (north, south):
        site.until(lambda site=site: site.store.received_plan(plan.digest) is not None)
        site.approve(plan)
        site.until(lambda site=site: all(leaf.receipt for leaf in site.store.own_leaves()) and len(site.store.own_leaves()) == 2)
        assert {type(read_leaf(leaf.leaf)) for leaf in site.store.own_leaves()} == {SiteAdmitted, PlanApproved}
        assert site.codes() == []
    assert server.approved(plan) == {"north", "south"}
    north.until(lambda: north.pass_once() and south.pass_once() and server.shortfalls() == ())


def test_the_operator_admits_only_what_the_hospital_reads_out(server, tmp_path):
    site, asked, text = server.asked(tmp_path / "east", "east")
    with pytest.raises(TransportError, match="PF421"):
        members.admit(server.home.root, SiteName("east"), "0000 " * 8)
    assert not server.ask(site, text).admitted
    members.admit(server.home.root, SiteName("east"), asked.fingerprint)
    assert server.ask(site, text).admitted
    members.revoke(server.home.root, SiteName("east"))


def test_a_used_and_an_expired_invitation_are_refused(server, make, tmp_path):
    west = make("west")
    text = server.texts["west"]
    thief = server.new_home(tmp_path / "thief", "west")
    with pytest.raises(PathfedError, match="PF412"):
        server.ask(thief, text)
    expired = members.invite(server.home.root, SiteName("late"), hours=1 / 3600 / 1000).text
    late = server.new_home(tmp_path / "late", "late")
    time.sleep(0.01)
    with pytest.raises(PathfedError, match="PF412"):
        server.ask(late, expired)
    assert server.ask(west.home, text).admitted, "the one who used it may ask again"


def test_an_operator_who_refuses_is_heard(server, tmp_path):
    home, _, text = server.asked(tmp_path / "no", "no")
    members.refuse(server.home.root, SiteName("no"))
    with pytest.raises(TransportError, match=r"PF432"):
        server.ask(home, text)


def test_a_site_whose_certificate_has_ended_is_invited_again_and_keeps_its_keys(server, make):
    site = make("late")
    keys = fingerprints(site.home.keys)
    text = members.invite(server.home.root, SiteName("late"), hours=1).text
    asked = server.ask(site.home, text)
    assert not asked.admitted
    members.admit(server.home.root, SiteName("late"), asked.fingerprint)
    assert server.ask(site.home, text).admitted
    now = fingerprints(SiteHome(site.home.root).keys)
    assert {kind for kind in KeyKind if now[kind] != keys[kind]} == {KeyKind.TLS}
    again = site.reopened()
    assert again.pass_once()
    again.close()


def test_a_revocation_takes_effect_on_a_connection_that_is_open(server, make):
    site = make("gone")
    assert site.pass_once()
    members.revoke(server.home.root, SiteName("gone"))
    assert not site.pass_once()
    assert site.store.facts()["agent_code"] == "PF415"


def test_renewal_and_rotation_of_every_key_go_on_with_the_same_site(server, make):
    site = make("turning")
    assert site.pass_once()
    before = site.home.certificate_file.read_bytes()
    for kind in KeyKind:
        site.agent.close()
        home = SiteHome(site.home.root)
        rotate(home, site.store, Outlet(site.record), kind, time.time())
        site = site.reopened()
        assert site.pass_once(), kind
    assert site.home.certificate_file.read_bytes() != before
    site.until(lambda: all(leaf.receipt for leaf in site.store.own_leaves()) and len(site.store.own_leaves()) == 2)
    assert {type(read_leaf(leaf.leaf)) for leaf in site.store.own_leaves()} == {SiteAdmitted, KeyRotated}
    assert site.codes() == []
    site.until(lambda: server.cosigned(site.home.name))
    site.close()


def test_a_new_authority_is_taken_up_by_itself(server, make):
    site = make("authority")
    assert site.pass_once()
    old = site.home.ca_file.read_bytes()
    members.rotate_authority(server.home.root)
    site.until(lambda: site.home.ca_file.read_bytes() != old)
    assert site.pass_once(), "with a certificate of the new authority"
    members.finish_rotation(server.home.root, leave_behind=True)
    assert site.reopened().pass_once()


def test_the_agents_process_looks_through_the_relay_and_ends_when_told(server, make):
    site = make("process")
    ports = [str(free_port()), str(free_port())]
    make_certificate(site.home.relay_files, "127.0.0.1", now=datetime.now(UTC))
    log = site.home.logs / "agent.log"
    with log.open("wb") as out:
        relay = subprocess.Popen([sys.executable, "-m", "pathfed_client.relaying", str(site.home.root), *ports], stdout=out, stderr=out)
        while not accepts_connections("127.0.0.1", int(ports[1])):
            assert relay.poll() is None
            time.sleep(0.1)
        process = subprocess.Popen(
            [sys.executable, "-m", "pathfed_client.control.agent", str(site.home.root), ports[1]], stdout=out, stderr=out
        )
    try:
        last = time.monotonic() + 60
        while PASSES not in site.store.facts():
            assert time.monotonic() < last
            time.sleep(0.1)
        assert site.store.facts()["agent_code"] == ""
    finally:
        for child in (process, relay):
            child.terminate()
            child.wait(20)
    assert log.read_text().count("Traceback") == 0
    sent = [entry.sent for entry in site.record.entries()]
    there = {site.home.server_card.control_address}
    assert {one.destination for one in sent if one.kind in (EgressKind.REPORT, EgressKind.COSIGNATURE)} == there
    opened = [one.destination for one in sent if one.kind is EgressKind.CONNECTION_OPENED]
    assert set(opened) == there, "one connection of the relay carried them"
