"""The relay as a process of a site's home: ends as it is told, and says by its status why it ended by itself."""

import contextlib
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tls_listener import listening

from pathfed_client.egress.entry import EgressKind, Outgoing
from pathfed_client.home import SiteHome
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.transport.relay import CERTIFICATE_REFUSED
from pathfed_client.transport.relay_certificate import make_certificate
from pathfed_common.processes import accepts_connections, free_port
from pathfed_server.transport.certificates import make_tls

NOW = datetime.now(UTC)
TLS = make_tls("test", ["127.0.0.1"], now=NOW)


@pytest.fixture
def home_for(world, copy_home: Callable[..., SiteHome]) -> Callable[..., SiteHome]:
    """A site whose server's fleet door is at a port of the loopback."""

    def make(port: int, ca: bytes = TLS.ca_certificate) -> SiteHome:
        made = copy_home()
        card = replace(made.server_card, fleet_address=f"127.0.0.1:{port}", control_address=f"127.0.0.1:{port}", ca_pem=ca.decode())
        (made.root / "server-card.dsse").write_bytes(card.to_bytes(world.server_key))
        (made.root / "ca.pem").write_bytes(ca)
        make_certificate(made.relay_files, "127.0.0.1", now=NOW)
        return SiteHome(made.root)

    return make


@contextlib.contextmanager
def relay(home: SiteHome, *ports: int) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "pathfed_client.relaying", str(home.root), *(str(port) for port in ports)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + 60
            while not all(accepts_connections("127.0.0.1", port) for port in ports) and process.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()


def left(home: SiteHome) -> list[Outgoing]:
    with EgressLog(home.egress) as record:
        record.verified()
        return [entry.sent for entry in record.entries()]


def ask(home: SiteHome, port: int) -> bytes:
    """What comes back, as SuperNode would see it."""
    context = ssl.create_default_context(cafile=home.relay_files / "ca.pem")
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as there,
    ):
        there.sendall(b"hello")
        with contextlib.suppress(OSError):
            return there.recv(100)
    return b""


def test_supernodes_bytes_go_to_the_fleet_door_and_are_in_the_homes_record_when_it_ends(tmp_path, home_for):
    with listening(tmp_path, TLS) as server:
        home, port = home_for(server), free_port()
        with relay(home, port) as process:
            assert ask(home, port) == b"hello"
            process.terminate()
            assert process.wait(30) == 0
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
    opened, closed = left(home)
    assert (opened.kind, closed.kind, closed.size) == (EgressKind.CONNECTION_OPENED, EgressKind.CONNECTION_CLOSED, 5)


def test_a_server_of_another_consortium_ends_the_relay_with_a_status_of_its_own(tmp_path, home_for):
    other = make_tls("other", ["127.0.0.1"], now=NOW)
    with listening(tmp_path, other) as server:
        home, port = home_for(server), free_port()
        with relay(home, port) as process:
            assert ask(home, port).startswith(b"HTTP/1.1 503")
            assert process.wait(30) == CERTIFICATE_REFUSED
            assert process.stderr is not None
            assert "PF401" in process.stderr.read()
    assert sum(one.size for one in left(home)) == 0


def test_the_tunnel_leads_to_the_control_address_with_the_clients_own_tls(tmp_path, home_for):
    with listening(tmp_path, TLS) as server:
        home, port, tunnel = home_for(server), free_port(), free_port()
        context = ssl.create_default_context(cafile=home.ca_file)
        with (
            relay_without_probe(home, port, tunnel),
            socket.create_connection(("127.0.0.1", tunnel), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as there,
        ):
            assert there.recv(100) == b"hello"
    assert left(home)[0].destination == f"127.0.0.1:{server}"


@contextlib.contextmanager
def relay_without_probe(home: SiteHome, port: int, tunnel: int) -> Iterator[None]:
    """The tunnel passes on whoever asks whether it is there: only the other port is asked."""
    command = [sys.executable, "-m", "pathfed_client.relaying", str(home.root), str(port), str(tunnel)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "ready" in process.stderr.readline()
            yield
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("spoil", "code", "status"),
    [
        (lambda home: (home.relay_files / "key.pem").unlink(), "PF904", 19),
        (lambda home: home.ca_file.write_text("no certificate"), "PF904", 19),
        (lambda home: home.egress.unlink(), "PF913", 19),
        (lambda home: (home.root / "policy.toml").write_text("bandwidth_mbit_s = 0"), "PF905", 19),
        (lambda home: (home.root / "server-card.dsse").unlink(), "PF904", 19),
    ],
    ids=["no key", "no CA", "no record", "no limit", "no card"],
)
def test_a_home_that_it_cannot_work_in_is_told(home_for, spoil, code, status):
    home, port = home_for(1), free_port()
    spoil(home)
    with relay(home, port) as process:
        assert process.wait(30) == status
        assert process.stderr is not None
        assert code in process.stderr.read()


def test_a_port_that_is_taken_is_told(home_for):
    home = home_for(1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "pathfed_client.relaying", str(home.root), str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 19
    assert "PF902" in done.stderr


def test_a_web_proxy_that_cannot_be_used_is_told(home_for, monkeypatch):
    monkeypatch.setenv("https_proxy", "socks5://proxy:1")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    home, port = home_for(1), free_port()
    with relay(home, port) as process:
        assert process.wait(30) == 14
        assert process.stderr is not None
        assert "PF451" in process.stderr.read()


def test_the_loopback_certificate_is_for_its_owner_alone_and_made_anew(tmp_path: Path):
    first = make_certificate(tmp_path / "relay", "127.0.0.1", now=NOW).certificate.read_bytes()
    again = make_certificate(tmp_path / "relay", "127.0.0.1", now=NOW)
    assert again.certificate.read_bytes() != first
    assert again.key.stat().st_mode & 0o777 == 0o600
    assert again.folder.stat().st_mode & 0o777 == 0o700
