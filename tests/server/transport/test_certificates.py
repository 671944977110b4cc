"""Real handshakes over loopback."""

import datetime
import socket
import ssl

import pytest
from tls_listener import listening

from pathfed_server.transport.certificates import TlsFiles, make_tls

NOW = datetime.datetime.now(datetime.UTC)


def greeted(tmp_path, tls: TlsFiles, trusted: TlsFiles, host: str = "127.0.0.1") -> bytes:
    context = ssl.create_default_context(cadata=trusted.ca_certificate.decode())
    with (
        listening(tmp_path, tls) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
        context.wrap_socket(connection, server_hostname=host) as secured,
    ):
        return secured.recv(5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "server.example"])
def test_every_named_host_is_trusted_through_the_ca(tmp_path, host):
    tls = make_tls("test", ["server.example", "127.0.0.1", "localhost"], now=NOW)
    assert greeted(tmp_path, tls, tls, host) == b"hello"


def test_another_ca_of_the_same_name_is_not_trusted(tmp_path):
    tls, other = (make_tls("test", ["127.0.0.1"], now=NOW) for _ in range(2))
    with pytest.raises(ssl.SSLCertVerificationError):
        greeted(tmp_path, tls, other)


def test_a_host_that_is_not_named_is_not_trusted(tmp_path):
    tls = make_tls("test", ["127.0.0.1"], now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        greeted(tmp_path, tls, tls, "server.example")


@pytest.mark.parametrize(("days", "why"), [(-398, "expired"), (1, "not yet valid")])
def test_a_certificate_out_of_its_time_is_not_trusted(tmp_path, days, why):
    tls = make_tls("test", ["127.0.0.1"], now=NOW + datetime.timedelta(days=days))
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        greeted(tmp_path, tls, tls)


def test_keys_are_hidden_when_printed():
    tls = make_tls("test", ["127.0.0.1"], now=NOW)
    assert "PRIVATE" not in repr(tls)
    assert tls.key != tls.ca_key
