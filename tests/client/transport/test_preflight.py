"""Real handshakes over loopback, and SuperNode's last words."""

import datetime
import socket
from pathlib import Path

import pytest
from tls_listener import listening

from pathfed_client.egress.entry import EgressKind
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.transport.preflight import check_server, explain
from pathfed_client.transport.relay import CERTIFICATE_REFUSED
from pathfed_common.errors import HostError, TransportError
from pathfed_common.processes import ProcessEnd
from pathfed_server.transport.certificates import TlsFiles, make_tls

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def check(tmp_path, shown: TlsFiles, pinned: TlsFiles) -> None:
    (tmp_path / "ca.pem").write_bytes(pinned.ca_certificate)
    with listening(tmp_path, shown) as port, record_in(tmp_path) as record:
        try:
            check_server(f"127.0.0.1:{port}", tmp_path / "ca.pem", record)
        finally:
            opened, closed = (entry.sent for entry in record.entries())
            assert (opened.kind, closed.kind) == (EgressKind.CONNECTION_OPENED, EgressKind.CONNECTION_CLOSED)
            assert (opened.size, closed.size, closed.destination) == (0, 0, f"127.0.0.1:{port}")


def record_in(folder: Path) -> EgressLog:
    EgressLog.create(folder / "egress.db")
    return EgressLog(folder / "egress.db")


def greet(folder: Path, address: str) -> None:
    """Of which nothing comes: no entry either."""
    with record_in(folder) as record:
        try:
            check_server(address, folder / "ca.pem", record)
        finally:
            assert list(record.entries()) == []


def test_a_server_with_the_consortiums_certificate_is_greeted(tmp_path):
    tls = make_tls("test", ["127.0.0.1"], now=NOW)
    check(tmp_path, tls, tls)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: make_tls("test", ["127.0.0.1"], now=NOW - 500 * DAY), "expired"),
        (lambda: make_tls("test", ["127.0.0.1"], now=NOW + 2 * DAY), "not yet valid"),
        (lambda: make_tls("test", ["server.example"], now=NOW), "mismatch"),
    ],
    ids=["expired", "not yet valid", "for another host"],
)
def test_a_certificate_that_does_not_hold_is_refused_with_the_reason(tmp_path, made, why):
    tls = made()
    with pytest.raises(TransportError, match=rf"PF401.*{why}"):
        check(tmp_path, tls, tls)


def test_a_certificate_of_another_consortium_is_refused(tmp_path):
    shown, pinned = (make_tls("test", ["127.0.0.1"], now=NOW) for _ in range(2))
    with pytest.raises(TransportError, match="PF401"):
        check(tmp_path, shown, pinned)


def test_a_server_that_does_not_answer_is_told_as_such(tmp_path):
    (tmp_path / "ca.pem").write_bytes(make_tls("test", ["127.0.0.1"], now=NOW).ca_certificate)
    with socket.socket() as taken:  # bound, and not listened on: nobody else can listen there
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError, match=r"PF403.*cannot be reached"):
            greet(tmp_path, f"127.0.0.1:{taken.getsockname()[1]}")


def test_an_address_without_a_port_is_told_as_such(tmp_path):
    (tmp_path / "ca.pem").write_bytes(make_tls("test", ["127.0.0.1"], now=NOW).ca_certificate)
    with pytest.raises(TransportError, match="PF403"):
        greet(tmp_path, "nowhere")


@pytest.mark.parametrize(
    ("log", "code"),
    [
        ("ERROR :   Node registration refused [code: 2004]\nExit Code: 305", "PF402"),
        ("Exit Code: 1\nsomething else", "PF903"),
        ("[code: 2004]" + "x" * 5000, "PF903"),  # long ago
        ("", "PF903"),
        (None, "PF903"),
    ],
)
def test_a_supernodes_end_is_explained_by_its_last_words(tmp_path, log, code):
    path = tmp_path / "supernode.log"
    if log is not None:
        path.write_text(log)
    error = explain(ProcessEnd(name="supernode", status=1, restarted=True, log=path), "server.example:443")
    assert error.code.value == code
    if code != "PF903":
        assert error.where == "server.example:443"


def test_a_pinned_certificate_that_cannot_be_read_is_named(tmp_path):
    missing = tmp_path / "ca.pem"
    with pytest.raises(HostError, match=r"PF904.*cannot be read"):
        greet(tmp_path, "127.0.0.1:9")
    for text in ("", "not a certificate"):
        missing.write_text(text)
        with pytest.raises(HostError, match=r"PF904.*holds no certificate"):
            greet(tmp_path, "127.0.0.1:9")


@pytest.mark.parametrize(("status", "code"), [(CERTIFICATE_REFUSED, "PF401"), (19, "PF903"), (-9, "PF903")])
def test_a_relays_end_is_explained_by_its_status(tmp_path, status, code):
    (tmp_path / "relay.log").write_text("PF401 the server's certificate is refused (long ago)")
    error = explain(ProcessEnd(name="relay", status=status, restarted=True, log=tmp_path / "relay.log"), "server.example:443")
    assert error.code.value == code


def test_a_web_proxy_of_the_environment_is_used(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("NO_PROXY", "")
        (tmp_path / "ca.pem").write_bytes(make_tls("test", ["127.0.0.1"], now=NOW).ca_certificate)
        with pytest.raises(TransportError, match="PF403") as caught:
            greet(tmp_path, "server.example:9092")
        assert caught.value.where == f"127.0.0.1:{taken.getsockname()[1]}"
