"""What the agent does with an honest server, and what it refuses from another."""

import datetime
from contextlib import closing

import pytest
from control_server import ControlServer, Refused

from pathfed_client import showing
from pathfed_client.control.agent import FETCH_EVERY, PASSES, Agent
from pathfed_client.control.certificates import certificate_times, check_certificate
from pathfed_client.control.rotating import rotate
from pathfed_client.control.supervising import AlarmTeller
from pathfed_client.egress.entry import EgressKind
from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome, hold
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.site_keys import KeyKind, fingerprints
from pathfed_client.io.site_store import SiteStore
from pathfed_client.transport.channel import Patience
from pathfed_client.transport.dial import Address, WebProxy
from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError, TransportError
from pathfed_common.plan import load_plan
from pathfed_common.processes import free_port
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.provenance import cosigned
from pathfed_common.provenance.documents import seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_server.transport.certificates import make_tls

PLAN = """
name = "tiny"
[privacy]
expected_patients = 2
noise_multiplier = 1.0
clip_norm = 1.0
delta = 1e-5
epsilon_limit = 50.0
[rounds]
count = 3
"""


def facts(site) -> dict[str, str]:
    return site.store.facts()


def test_published_plans_come_to_the_site_once(site, server):
    plan = load_plan(PLAN, where="tiny")
    server.plans = [seal_plan(plan, server.key)]
    assert site.agent.pass_once()
    assert [(one.plan, one.signed_plan) for one in site.store.received_plans()] == [(plan.digest, server.plans[0])]
    assert site.agent.pass_once()
    assert server.calls.count("ListPlans") == 1, "a log that has not grown has no new plan, and the sixth pass is far"
    assert [event.kind for event in site.store.events()] == ["plan"]


def test_operators_signatures_that_come_later_reach_the_site_though_the_log_has_not_grown(site, server):
    server.plans = [seal_plan(load_plan(PLAN, where="tiny"), server.key)]
    assert site.agent.pass_once()
    more = server.plans[0]
    for _ in range(2):
        more = cosigned.cosign(more, SigningKey.generate())
    server.plans = [more]
    for _ in range(FETCH_EVERY - 1):
        assert site.agent.pass_once()
    assert server.calls.count("ListPlans") == 1
    assert site.agent.pass_once()
    assert server.calls.count("ListPlans") == server.calls.count("GetServerCard") == 2
    (kept,) = site.store.received_plans()
    assert kept.signed_plan == more
    assert [event.kind for event in site.store.events()] == ["plan"], "published once"


@pytest.mark.parametrize("case", ["another key", "no plan", "changed"])
def test_a_plan_that_the_server_did_not_sign_is_not_kept_and_cried_out_about(case, site, server):
    good = seal_plan(load_plan(PLAN, where="tiny"), server.key)
    bad = {
        "another key": seal_plan(load_plan(PLAN, where="tiny"), SigningKey.generate()),
        "no plan": b"plan",
        "changed": good.replace(b"a", b"b", 1),
    }
    server.plans = [bad[case], good]
    site.agent.pass_once()
    assert site.codes() == ["PF106"]
    assert [one.signed_plan for one in site.store.received_plans()] == [good], "the others are taken"


def test_words_reach_the_server_in_order_and_a_refused_one_waits(site, server):
    for word in (b"first", b"second"):
        site.store.add_word(word, b"leaf " + word, site.clock[0])

    def refuse_the_first(request, honest):
        if request.envelope == b"first":
            raise Refused("PF516")
        return honest

    server.lies["Decide"] = refuse_the_first
    assert site.agent.pass_once()
    waiting = site.store.words(waiting=True)
    assert [(word.envelope, word.code) for word in waiting] == [(b"first", ErrorCode.PLAN_UNKNOWN)]
    del server.lies["Decide"]
    assert site.agent.pass_once()
    assert site.store.words(waiting=True) == []
    assert {leaf.leaf for leaf in site.store.own_leaves()} >= {b"leaf first", b"leaf second"}


def test_a_server_that_fails_is_asked_again_and_words_keep(site, server):
    site.store.add_word(b"first", b"leaf", site.clock[0])
    server.lies["Report"] = lambda request, honest: (_ for _ in ()).throw(Refused("PF419"))
    assert not site.agent.pass_once()
    assert facts(site)["agent_code"] == "PF419"
    del server.lies["Report"]
    assert site.agent.pass_once()
    assert facts(site)["agent_code"] == ""
    assert server.words == [b"first"]


def test_a_stopped_site_goes_on_reporting_handing_over_and_cosigning(site, server):
    site.store.add_word(b"word", b"leaf", site.clock[0])
    site.home.stop_switch.throw(at=site.clock[0], reason="audit")
    assert site.agent.pass_once()
    assert server.words == [b"word"]
    assert [request.state for request in server.requests if isinstance(request, pb.ReportRequest)] == ["stopped"]
    assert EgressKind.COSIGNATURE in {entry.sent.kind for entry in site.record.entries()}


def test_a_server_that_nobody_runs_has_its_code_and_is_told_of_once(site, server):
    files.write_atomic(site.home.server_card_file, server.card(control_address=f"127.0.0.1:{free_port()}"))
    site = site.reopened()
    try:
        assert not site.agent.pass_once()
        assert facts(site)["agent_code"] == "PF403"
        assert not site.agent.pass_once()
        assert [event.code for event in site.store.events()] == [ErrorCode.SERVER_UNREACHABLE]
    finally:
        site.close()


def test_a_server_of_another_ca_gets_nothing_and_the_site_says_so(site, server):
    other = make_tls("test", ["127.0.0.1"], now=datetime.datetime.now(datetime.UTC))
    with ControlServer(tls=other).running() as impostor:
        moved = server.card(control_address=f"127.0.0.1:{impostor.control_port}")
        files.write_atomic(site.home.server_card_file, moved)
        site = site.reopened()
        try:
            assert not site.agent.pass_once()
            assert facts(site)["agent_code"] == "PF401"
            assert impostor.calls == []
        finally:
            site.close()


def test_a_revoked_site_is_told_and_goes_on_asking(site, server):
    def revoked(request, honest):
        raise Refused("PF415")

    server.lies["Report"] = revoked
    assert not site.agent.pass_once()
    assert facts(site)["agent_code"] == "PF415"
    del server.lies["Report"]
    assert site.agent.pass_once()


def test_new_addresses_are_taken_up_from_a_card_of_the_same_key(site, server):
    server.lies["GetServerCard"] = lambda request, honest: _card(honest, server.card(fleet_address="other.example:7"))
    assert site.agent.pass_once()
    assert SiteHome(site.home.root).server_card.fleet_address == "other.example:7"
    assert site.codes() == []


def _card(reply, data: bytes):
    reply.server_card = data
    return reply


@pytest.mark.parametrize(("case", "code"), [("another key", "PF431"), ("another name", "PF431"), ("changed", "PF433"), ("none", "PF433")])
def test_a_card_of_another_server_is_cried_out_about_and_not_kept(case, code, site, server):
    before = site.home.server_card_file.read_bytes()
    other = ControlServer()
    cards = {
        "another key": other.card(),
        "another name": server.card(name="other"),
        "changed": before.replace(b"a", b"b", 1),
        "none": b"",
    }
    server.lies["GetServerCard"] = lambda request, honest: _card(honest, cards[case])
    site.agent.pass_once()
    assert site.codes() == [code]
    assert site.home.server_card_file.read_bytes() == before


def test_what_leaves_is_written_down_before_it_leaves(site, server):
    site.store.add_word(b"word", b"leaf", site.clock[0])
    site.agent.pass_once()
    written = [entry.sent for entry in site.record.entries()]
    kinds = [one.kind for one in written]
    assert kinds[0] is EgressKind.ENROLMENT
    assert {EgressKind.REPORT, EgressKind.DECISION, EgressKind.QUERY, EgressKind.COSIGNATURE} <= set(kinds)
    assert len(written) == len(server.calls)
    sizes = [request.ByteSize() for request in server.requests]
    assert sorted(one.size for one in written) == sorted(sizes), "as many bytes as arrived"
    assert {one.destination for one in written} == {f"127.0.0.1:{server.enrolment_port}", f"127.0.0.1:{server.control_port}"}


def test_nothing_leaves_that_cannot_be_written_down(site, server):
    class Full:
        def append(self, *sent):
            raise HostError(ErrorCode.DISK_FULL, "full")

        def left_before(self, kind, run, round_index):
            return False

    before = len(server.calls)
    agent = Agent(SiteHome(site.home.root), site.store, Outlet(Full()), patience=Patience(attempts=1))
    with pytest.raises(HostError, match="PF901"), closing(agent):
        agent.pass_once()
    assert len(server.calls) == before


# Renewal


def age(site, share: float) -> None:
    """Let so much of the certificate's life be over."""
    begin, end = certificate_times(site.home.certificate_file.read_bytes())
    site.clock[0] = begin + share * (end - begin)


def pair_fits(home: SiteHome) -> bool:
    check_certificate(
        home.certificate_file.read_bytes(), home.keys.tls_key(), home.ca_file.read_bytes(), "spiffe://test/site/site-a", "here"
    )
    return True


def test_key_and_certificate_are_renewed_after_two_thirds_of_their_life(site, server):
    before = site.home.certificate_file.read_bytes(), fingerprints(site.home.keys)
    age(site, 0.66)
    assert site.agent.pass_once()
    assert "Renew" not in server.calls
    age(site, 0.67)
    assert site.agent.pass_once()
    assert server.calls.count("Renew") == 1
    after = site.home.certificate_file.read_bytes(), fingerprints(site.home.keys)
    assert after[0] != before[0]
    assert {kind for kind in KeyKind if after[1][kind] != before[1][kind]} == {KeyKind.TLS}
    assert pair_fits(site.home)
    age(site, 0.1)
    assert site.agent.pass_once(), "it goes on with the new pair"


def test_the_server_can_ask_for_a_renewal(site, server):
    server.renew_wanted = True
    assert site.agent.pass_once()
    assert server.calls.count("Renew") == 1


def test_a_renewal_whose_answer_was_lost_is_asked_for_again_with_another_key(site, server):
    asked: list[bytes] = []

    def taken(request, honest):
        asked.append(request.tls_csr_der)
        if len(asked) == 1:
            raise Refused("PF414")
        return honest

    server.lies["Renew"] = taken
    server.renew_wanted = True
    assert site.agent.pass_once()
    assert len(set(asked)) == 2
    assert pair_fits(site.home)


@pytest.mark.parametrize("stopped_at", ["ca.pem", "site.pem.next", "promote", "site.pem"])
def test_a_renewal_that_was_cut_short_leaves_a_pair_that_fits(stopped_at, site, server, monkeypatch):
    server.renew_wanted = True
    write = files.write_atomic

    def killed(path, data, **options):
        if path.name == stopped_at:
            raise KeyboardInterrupt
        write(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", killed)
        if stopped_at == "promote":
            patch.setattr("pathfed_client.io.site_keys.FileKeys.promote", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            site.agent.pass_once()
    server.renew_wanted = False
    again = site.reopened()
    try:
        assert again.agent.pass_once()
        assert pair_fits(again.home)
        assert not again.home.next_certificate_file.exists()
    finally:
        again.close()


def test_the_agent_goes_on_with_a_pair_that_a_command_has_put_in_place(site, server):
    assert site.agent.pass_once()
    before = site.agent._client
    rotate(SiteHome(site.home.root), site.store, Outlet(site.record), KeyKind.TLS, site.clock[0])
    assert site.agent.pass_once()
    assert site.agent._client is not before
    assert site.agent._certificate == site.home.certificate_file.read_bytes()
    kept = site.agent._client
    assert site.agent.pass_once()
    assert site.agent._client is kept, "no other one while nothing changes"


def test_an_error_is_followed_by_a_new_connection(site, server):
    assert site.agent.pass_once()
    server.lies["Report"] = lambda request, honest: (_ for _ in ()).throw(Refused("PF414"))
    assert not site.agent.pass_once()
    assert site.agent._client is None


def test_while_a_command_is_at_the_keys_a_pass_is_skipped(site, server):
    before = len(server.calls)
    with hold(site.home, "keys"):
        assert not site.agent.pass_once()
    assert len(server.calls) == before, "no connection with half of a pair"
    assert site.agent.pass_once()
    server.renew_wanted = True
    with hold(site.home, "keys"):
        assert not site.agent.pass_once()
    assert "Renew" not in server.calls
    assert site.agent.pass_once()
    assert server.calls.count("Renew") == 1
    assert site.codes() == []


@pytest.mark.parametrize("case", ["another key", "another CA", "nothing"])
def test_a_renewed_certificate_that_does_not_fit_is_not_taken(case, site, server):
    before = site.home.certificate_file.read_bytes()
    other = make_tls("test", ["127.0.0.1"], now=datetime.datetime.now(datetime.UTC))

    def lie(request, honest):
        match case:
            case "another key":
                honest.certificate_pem = before
            case "another CA":
                honest.ca_pem = other.ca_certificate
            case "nothing":
                honest.certificate_pem = b""
        return honest

    server.lies["Renew"] = lie
    server.renew_wanted = True
    assert not site.agent.pass_once()
    assert facts(site)["agent_code"] == "PF433"
    assert site.home.certificate_file.read_bytes() == before
    assert pair_fits(site.home)


def test_a_second_ca_beside_the_first_is_taken_up(site, server):
    second = make_tls("test", ["127.0.0.1"], now=datetime.datetime.now(datetime.UTC))

    def both(request, honest):
        honest.ca_pem = server.tls.ca_certificate + second.ca_certificate
        return honest

    server.lies["Renew"] = both
    server.renew_wanted = True
    assert site.agent.pass_once()
    assert site.home.ca_file.read_bytes() == server.tls.ca_certificate + second.ca_certificate


# The process


def test_passes_go_on_and_a_new_word_does_not_wait(site, server):
    naps: list[float] = []

    class Enough(Exception):  # noqa: N818
        pass

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            site.store.add_word(b"word", b"leaf", site.clock[0])
        if server.words:
            raise Enough

    with pytest.raises(Enough):
        site.agent.run(sleep)
    assert len(naps) == 3, "it did not wait for the next pass"
    assert facts(site)[PASSES].endswith(" 2")


def test_alarms_are_told_once(site):
    told: list[str] = []
    teller = AlarmTeller(site.store, told.append)
    (site.home.run_secrets / "log-head").unlink()
    site.agent.pass_once()
    for _ in range(40):
        teller.look()
    assert len(told) == 1
    assert "PF436" in told[0]


def test_a_home_that_is_not_enrolled_has_no_agent(home):
    with SiteStore(home.database) as store, EgressLog(home.egress) as record, pytest.raises(TransportError, match="PF430"):
        Agent(home, store, Outlet(record))


def test_an_answer_in_words_of_a_later_version_is_refused_with_a_code(site, server):
    def unknown(request, honest):
        raise Refused("PF999")

    server.lies["Report"] = unknown
    assert not site.agent.pass_once()
    assert facts(site)["agent_code"] == "PF433"


def test_secrets_show_in_no_repr(site):
    assert "word" not in repr(WebProxy(Address("host", 1), "user:password"))
    key = site.home.keys.tls_key().decode()[40:80]
    for value in (site.agent, site.home, site.home.keys, site.agent._client, site.home.evidence_key):
        assert key not in repr(value)


def test_what_became_of_its_rounds_comes_to_the_site_and_nothing_unreadable(site, server):
    good = pb.Outcome(run="lung-1", round=7, state="refused", code="PF508", offered_at=1.5)
    server.told = {
        "suspended": True,
        "outcomes": [
            good,
            pb.Outcome(run="../x", round=6, state="refused", code="PF508", offered_at=1.5),
            pb.Outcome(run="lung-1", round=5, state="\x1b[2Jgone", code="", offered_at=1.5),
            pb.Outcome(run="lung-1", round=4, state="refused", code="call 0800", offered_at=1.5),
            pb.Outcome(run="lung-1", round=3, state="admitted", code="", offered_at=float("nan")),
            *[pb.Outcome(run="lung-1", round=2, state="admitted", code="", offered_at=0.5)] * 100,
        ],
    }
    assert site.agent.pass_once()
    shown = showing.status(site.home)
    assert shown["control"]["suspended"] is True
    assert shown["rounds"][0] == {"run": "lung-1", "round_index": 7, "state": "refused", "code": "PF508", "offered_at": 1.5}
    assert {one["round_index"] for one in shown["rounds"]} == {7, 2}
    assert len(shown["rounds"]) < 60
    server.told = {}
    assert site.agent.pass_once()
    assert (showing.status(site.home)["control"]["suspended"], showing.status(site.home)["rounds"]) == (False, [])
