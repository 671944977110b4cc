"""Enrolment from the site's side, against a real server on loopback that lies where a test says so."""

import datetime
import socket
import stat
import time
from pathlib import Path

import pytest
from connect_proxy import proxying
from control_server import ControlServer, Refused

from pathfed_client.control.certificates import check_certificate
from pathfed_client.control.enrolling import enroll, enrolment_fingerprint
from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.site_keys import KeyKind, certificate_request, fingerprints
from pathfed_common.errors import HostError, PathfedError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol.enrolment import request_fingerprint
from pathfed_common.provenance.keys import SigningKey
from pathfed_server.transport.certificates import make_tls

NOW = datetime.datetime.now(datetime.UTC)


def asked_with(home, text, **options):
    with EgressLog(home.egress) as record:
        return enroll(home, text, Outlet(record), **options)


def ask(home, server, **options):
    return asked_with(home, server.invitation("site-a"), **{"wait": False, "tell": lambda line: None, **options})


def nothing_kept(home: SiteHome) -> bool:
    return not any(path.exists() for path in (home.server_card_file, home.ca_file, home.certificate_file))


def refused(home, server, code: str, text: str | None = None) -> PathfedError:
    with pytest.raises(PathfedError, match=code) as raised:
        asked_with(home, server.invitation("site-a") if text is None else text, wait=False, tell=lambda line: None)
    assert nothing_kept(home)
    return raised.value


def test_a_site_is_asked_for_admitted_and_enrolled(home, server):
    asked = ask(home, server)
    assert not asked.admitted
    assert nothing_kept(home)
    request = server.requests[-1]
    assert asked.fingerprint == request_fingerprint(request.site_card, request.tls_csr_der) == enrolment_fingerprint(home)
    server.state = pb.EnrollReply.ADMITTED
    done = ask(home, server)
    assert done.admitted
    assert SiteHome(home.root).server_card.evidence_key == server.key.public
    assert home.ca_file.read_bytes() == server.tls.ca_certificate
    assert done.certificate_until is not None
    assert done.certificate_until > NOW.timestamp()


def test_no_private_key_leaves_and_the_request_stays_the_same(home, server):
    for _ in range(2):
        ask(home, server)
    first, second = server.requests
    assert first == second, "the same request again gives the present state"
    sent = first.SerializeToString()
    for path in (home.root / "keys").iterdir():
        assert path.read_bytes() not in sent
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_enrolling_again_when_enrolled_changes_no_key(home, server):
    server.state = pb.EnrollReply.ADMITTED
    ask(home, server)
    before = {path.name: path.read_bytes() for path in (home.root / "keys").iterdir()}
    ask(SiteHome(home.root), server)
    assert {path.name: path.read_bytes() for path in (home.root / "keys").iterdir()} == before


def test_waiting_ends_with_the_operators_decision_and_tells_the_fingerprint(home, server):
    told: list[str] = []

    def admit(seconds: float) -> None:
        server.state = pb.EnrollReply.ADMITTED

    assert ask(home, server, wait=True, tell=told.append, sleep=admit).admitted
    assert enrolment_fingerprint(home) in told[0]


def test_a_server_that_is_away_while_the_operator_is_waited_for_is_asked_again(home, server):
    told: list[str] = []
    failing: list[int] = []

    def away(request, honest):
        failing.append(1)
        if 2 <= len(failing) <= 3:
            raise Refused("PF419")
        return honest

    def nap(seconds: float) -> None:
        if len(failing) == 3:
            server.state = pb.EnrollReply.ADMITTED

    server.lies["Enroll"] = away
    assert ask(home, server, wait=True, tell=told.append, sleep=nap).admitted
    assert sum("PF419" in line for line in told) == 1


def test_a_further_invitation_is_used_with_a_new_tls_key_and_all_else_stays(home, server):
    server.state = pb.EnrollReply.ADMITTED
    ask(home, server)
    before = fingerprints(home.keys)
    other = bytes(reversed(range(32)))
    server.secrets.append(other)
    text = server.invitation("site-a", secret=other)
    for _ in range(2):
        assert asked_with(SiteHome(home.root), text, wait=False, tell=lambda line: None).admitted
    after = fingerprints(home.keys)
    assert {kind for kind in KeyKind if after[kind] != before[kind]} == {KeyKind.TLS}
    assert not home.keys.is_staged(KeyKind.TLS)
    first, *further = [request.tls_csr_der for request in server.requests]
    assert first not in further
    assert further[0] == further[1], "the same invitation, the same request"
    check_certificate(home.certificate_file.read_bytes(), home.keys.tls_key(), server.tls.ca_certificate, "spiffe://test/site/site-a", "")


def test_the_operators_refusal_has_its_code(home, server):
    server.state = pb.EnrollReply.REFUSED
    refused(home, server, "PF432")


@pytest.mark.parametrize("text", ["", "pathfed1.", "pathfed1.AAAA", "x" * 5000, "pathfed1.\ud800"])
def test_what_is_no_invitation_is_refused_before_anything_is_sent(home, server, text):
    refused(home, server, "PF411", text)
    assert server.calls == []


def test_an_invitation_that_the_server_does_not_take_ends_with_the_servers_code(home, server):
    refused(home, server, "PF412", server.invitation("site-a", secret=bytes(32)))


def test_an_invitation_of_another_site_is_refused_before_anything_is_sent(home, server):
    refused(home, server, "PF915", server.invitation("site-b"))
    assert server.calls == []


def test_a_server_with_another_ca_gets_nothing(home, server):
    other = make_tls("test", ["127.0.0.1"], now=NOW)
    with ControlServer(tls=other).running() as impostor:
        text = server.invitation("site-a", enrolment_address=f"127.0.0.1:{impostor.enrolment_port}")
        refused(home, server, "PF431", text)
        assert impostor.calls == [], "the secret was not sent"


def test_a_server_that_shows_the_pinned_ca_without_its_key_gets_nothing(home, server):
    """The CA's certificate is public: an impostor can show it beside a certificate of its own."""
    other = make_tls("test", ["127.0.0.1"], now=NOW)
    mixed = type(other)(server.tls.ca_certificate, other.ca_key, other.certificate, other.key)
    with ControlServer(tls=mixed).running() as impostor:
        text = server.invitation("site-a", enrolment_address=f"127.0.0.1:{impostor.enrolment_port}")
        refused(home, server, "PF401", text)
        assert impostor.calls == []


def test_a_server_with_another_evidence_key_is_refused(home, server):
    server.state = pb.EnrollReply.ADMITTED
    refused(home, server, "PF431", server.invitation("site-a", server_key=SigningKey.generate().public))


def test_a_server_that_is_away_has_its_code(home, server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    refused(home, server, "PF403", server.invitation("site-a", enrolment_address=f"127.0.0.1:{free}"))


def changed(**fields):
    def lie(request, honest):
        return pb.EnrollReply(**{name: fields.get(name, getattr(honest, name)) for name in pb.EnrollReply.DESCRIPTOR.fields_by_name})

    return lie


def another_key(server):
    csr = certificate_request(_key(), SiteName("site-a"))
    return changed(certificate_pem=server.certificate(csr, "site-a"))


def _key() -> bytes:
    from pathfed_client.io import site_keys

    return site_keys._generate(KeyKind.TLS)


def of_another_site(server):
    return lambda request, honest: changed(certificate_pem=server.certificate(request.tls_csr_der, "site-b"))(request, honest)


def of_another_ca(server):
    other = make_tls("test", ["127.0.0.1"], now=NOW)
    return lambda request, honest: changed(certificate_pem=server.certificate(request.tls_csr_der, "site-a", tls=other))(request, honest)


ANSWERS = {
    "no certificate": lambda server: changed(certificate_pem=b""),
    "a certificate that is none": lambda server: changed(certificate_pem=b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    "a certificate without a SPIFFE id": lambda server: changed(certificate_pem=server.tls.ca_certificate),
    "a certificate for another key": another_key,
    "a certificate of another site": of_another_site,
    "a certificate of another CA": of_another_ca,
    "no CA": lambda server: changed(ca_pem=b""),
    "another CA alone": lambda server: changed(ca_pem=make_tls("test", ["x"], now=NOW).ca_certificate),
    "no server card": lambda server: changed(server_card=b""),
    "a changed server card": lambda server: changed(server_card=server.card().replace(b"payload", b"Payload", 1)),
    "an unknown state": lambda server: changed(state=99),
    "no state": lambda server: changed(state=0),
    "an unknown code": lambda server: _raises(Refused("PF999")),
}


def _raises(error):
    def lie(request, honest):
        raise error

    return lie


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_that_is_not_what_it_says_is_refused_and_nothing_is_kept(case, home, server):
    server.state = pb.EnrollReply.ADMITTED
    server.lies["Enroll"] = ANSWERS[case](server)
    refused(home, server, "PF433")
    del server.lies["Enroll"]
    assert ask(home, server).admitted, "the same command goes on where it was"


def test_a_home_of_one_server_is_not_enrolled_with_another(home, server):
    server.state = pb.EnrollReply.ADMITTED
    ask(home, server)
    with ControlServer().running() as other, pytest.raises(HostError, match="PF915"):
        asked_with(SiteHome(home.root), other.invitation("site-a"), wait=False, tell=lambda line: None)
    assert SiteHome(home.root).server_card.evidence_key == server.key.public


@pytest.mark.parametrize("stopped_before", ["server_card_file", "ca_file", "next_certificate_file", "certificate_file"])
def test_a_command_that_was_cut_short_goes_on_with_the_same_keys(stopped_before, home, server, monkeypatch):
    from pathfed_common import files

    server.state = pb.EnrollReply.ADMITTED
    stop_at = getattr(home, stopped_before)
    write = files.write_atomic

    def killed(path: Path, data: bytes, **options) -> None:
        if path == stop_at:
            raise KeyboardInterrupt
        write(path, data, **options)

    keys = {path.name: path.read_bytes() for path in (home.root / "keys").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(home, server)
    assert not home.certificate_file.exists(), "with the certificate the home is enrolled"
    assert ask(SiteHome(home.root), server).admitted
    assert {path.name: path.read_bytes() for path in (home.root / "keys").iterdir()} == keys


def test_a_home_of_an_earlier_version_gets_its_tls_key_when_it_enrols(home, server):
    home.keys.path(KeyKind.TLS).unlink()
    server.state = pb.EnrollReply.ADMITTED
    assert ask(home, server).admitted
    assert home.keys.has(KeyKind.TLS)


def test_a_home_that_is_not_enrolled_says_so(home):
    with pytest.raises(TransportError, match="PF430"):
        home.server_card  # noqa: B018 - reading is what fails


def test_a_certificate_for_the_site_is_accepted(home, server):
    csr = certificate_request(home.keys.tls_key(), home.name)
    made = server.certificate(csr, "site-a", days=3)
    until = check_certificate(made, home.keys.tls_key(), server.tls.ca_certificate, "spiffe://test/site/site-a", "here")
    assert abs(until - time.time() - 3 * 86400) < 600


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY"])
def test_all_of_an_enrolment_goes_through_the_hospitals_proxy(variable, home, server, monkeypatch):
    server.state = pb.EnrollReply.ADMITTED
    with proxying() as proxy:
        monkeypatch.setenv(variable, f"http://clinic:secret%40word@127.0.0.1:{proxy.port}")
        assert ask(home, server).admitted
    assert proxy.asked == [f"127.0.0.1:{server.enrolment_port}"] * 2, "the look at the pin, and the request"
    assert all(b"proxy-authorization: basic" in head.lower() for head in proxy.heads)


def test_no_proxy_is_heeded(home, server, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    assert not ask(home, server).admitted


def test_a_proxy_that_refuses_has_its_code(home, server, monkeypatch):
    with proxying(refuse=True) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        refused(home, server, "PF451")


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:1", "http://", "http://host:port"])
def test_a_proxy_variable_that_is_none_is_named(value, home, server, monkeypatch):
    monkeypatch.setenv("https_proxy", value)
    refused(home, server, "PF451")
