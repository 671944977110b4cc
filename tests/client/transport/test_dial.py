"""Addresses, proxies and the owner of a socket, from what the environment and the kernel say; and the limit, on a clock of its own."""

import os
import socket

import pytest

from pathfed_client.transport import peer
from pathfed_client.transport.bandwidth import Bandwidth
from pathfed_client.transport.dial import Address, WebProxy, proxy_for
from pathfed_client.transport.peer import owner_of
from pathfed_common.errors import TransportError

SERVER = Address("server.example", 9092)


@pytest.mark.parametrize(
    ("text", "host", "port"), [("server.example:9092", "server.example", 9092), ("[::1]:443", "::1", 443), ("10.0.0.1:1", "10.0.0.1", 1)]
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "server.example", ":443", "server:", "server:0", "server:65536", "server:-1", "server:٣", "server:1e3", "server:44 3"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"http_proxy": "http://proxy:1"}, None),
        ({"https_proxy": ""}, None),
        ({"https_proxy": "http://proxy.example:8080"}, WebProxy(Address("proxy.example", 8080))),
        ({"HTTPS_PROXY": "proxy.example"}, WebProxy(Address("proxy.example", 3128))),
        ({"https_proxy": "http://a:1", "HTTPS_PROXY": "http://b:2"}, WebProxy(Address("a", 1))),
        ({"https_proxy": "http://me:s%40crt@proxy:1"}, WebProxy(Address("proxy", 1), "me:s@crt")),
        ({"https_proxy": "http://proxy:1", "no_proxy": "other.example, .example"}, None),
        ({"https_proxy": "http://proxy:1", "NO_PROXY": "server.example"}, None),
        ({"https_proxy": "http://proxy:1", "no_proxy": "*"}, None),
        ({"https_proxy": "http://proxy:1", "no_proxy": "ver.example,,xample"}, WebProxy(Address("proxy", 1))),
    ],
    ids=str,
)
def test_the_proxy_is_the_environments(environment: dict[str, str], expected: WebProxy | None) -> None:
    assert proxy_for(SERVER, environment) == expected


@pytest.mark.parametrize("text", ["socks5://proxy:1080", "https://proxy:443", "http://", "http://proxy:port", "http://proxy:99999"])
def test_a_proxy_that_cannot_be_used_is_told_without_its_password(text: str) -> None:
    with pytest.raises(TransportError, match="PF451") as caught:
        proxy_for(SERVER, {"https_proxy": text.replace("proxy", "me:secret@proxy")})
    assert "secret" not in str(caught.value)


def test_a_proxys_password_is_not_in_its_repr() -> None:
    assert "secret" not in repr(proxy_for(SERVER, {"https_proxy": "http://me:secret@proxy:1"}))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_owner_of_a_connection_is_known_while_it_lasts(family: socket.AddressFamily) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if family == socket.AF_INET:
            client = socket.create_connection(listener.getsockname())
        else:
            client = socket.socket(socket.AF_INET6)
            client.connect((f"::ffff:{listener.getsockname()[0]}", listener.getsockname()[1]))
        served, far = listener.accept()
        with served:
            assert owner_of(far, served.getsockname()) == os.geteuid()
            assert owner_of((far[0], far[1] ^ 1), served.getsockname()) is None
            client.close()
            assert owner_of(far, served.getsockname()) is None


def test_an_owner_that_slips_from_one_read_of_the_table_is_found_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([[], [(peer._written(("127.0.0.1", 1)), peer._written(("127.0.0.1", 2)), "01", 7)]])
    monkeypatch.setattr(peer, "_sockets", lambda: iter(next(looks)))
    assert owner_of(("127.0.0.1", 1), ("127.0.0.1", 2)) == 7


def test_a_limit_lets_through_what_it_allows_and_not_less() -> None:
    limit = Bandwidth(1000.0)
    now = sent = 0.0
    for _ in range(200):
        wait = limit.delay(100, now)
        now += wait
        sent += 100
        assert sent <= 1000.0 * (now + 0.25) + 100
    assert sent >= 1000.0 * now * 0.9
    assert limit.delay(100, now + 60) == 0.0, "a pause saves up no more than a burst"
    assert sum(limit.delay(100, now + 60) for _ in range(10)) > 0.0


def test_without_a_limit_nothing_waits() -> None:
    limit = Bandwidth(None)
    assert all(limit.delay(10**9, 0.0) == 0.0 for _ in range(3))
    assert limit.part == 65536


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_limit_must_let_something_through(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Bandwidth(rate)


def test_parts_are_small_where_the_line_is_slow() -> None:
    assert Bandwidth(8000.0).part == 2000
    assert Bandwidth(10.0).part == 512
