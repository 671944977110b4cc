"""The relay between a real client and a real TLS server: everything is counted, nothing else is reached, and no connection hangs."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from packet_capture import Building, building
from relay_world import NOW, Relayed, echo, end, never_reads, relaying, reset, serving, until

from pathfed_client.egress import connection as counting
from pathfed_client.egress.entry import EgressKind
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.transport import dial
from pathfed_client.transport import relay as relay_module
from pathfed_client.transport.dial import Address, WebProxy
from pathfed_common import digest
from pathfed_common.errors import ErrorCode, HostError
from pathfed_server.transport.certificates import make_tls

SENT = b"POST /v1/fleet/pull-messages HTTP/1.1\r\n\r\n" * 500


def test_every_byte_goes_through_unchanged_and_is_counted_with_its_digest(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port) as relayed:
            reader, writer = await relayed.client()
            writer.write(SENT)
            assert await reader.readexactly(len(SENT)) == SENT
            assert [one.kind for one in relayed.left()] == [EgressKind.CONNECTION_OPENED], "written down before anything goes"
            await end(writer)
            await until(relayed.closed)
            assert bytes(server.came) == SENT
        opened, closed = relayed.left()
        assert (opened.size, opened.digest, opened.connection) == (0, digest.of_bytes(b""), closed.connection)
        assert (closed.kind, closed.size, closed.digest) == (EgressKind.CONNECTION_CLOSED, len(SENT), digest.of_bytes(SENT))
        assert {one.destination for one in (opened, closed)} == {f"127.0.0.1:{server.port}"}

    asyncio.run(scene())


def test_connections_are_counted_apart(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port) as relayed:
            streams = [await relayed.client() for _ in range(4)]
            for number, (reader, writer) in enumerate(streams, start=1):
                writer.write(bytes(number * 1000))
                await reader.readexactly(number * 1000)
            for _, writer in streams:
                await end(writer)
            await until(relayed.closed)
        closed = [one for one in relayed.left() if one.kind is EgressKind.CONNECTION_CLOSED]
        assert sorted(one.size for one in closed) == [1000, 2000, 3000, 4000]
        assert len({one.connection for one in closed}) == 4

    asyncio.run(scene())


def test_a_long_connection_gets_entries_on_the_way_and_they_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "ENTRY_BYTES", 100_000)
    data = os.urandom(1_000_000)

    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port) as relayed:
            reader, writer = await relayed.client()
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            await end(writer)
            await until(relayed.closed)
        _, *entries = relayed.left()
        assert len(entries) >= 5
        assert {one.kind for one in entries[:-1]} == {EgressKind.CONNECTION_SENT}
        start = 0
        for one in entries:
            assert one.digest == digest.of_bytes(data[start : start + one.size])
            start += one.size
        assert start == len(data)

    asyncio.run(scene())


def test_an_entry_is_due_after_a_while_too() -> None:
    count = counting.ConnectionCount(destination="a:1", connection="1-1", via=None, now=0.0)
    assert not count.due(counting.ENTRY_S + 1), "nothing was sent"
    count.count(b"x")
    assert not count.due(counting.ENTRY_S - 1)
    assert count.due(counting.ENTRY_S)
    count.entry(counting.ENTRY_S)
    count.count(b"x")
    assert not count.due(counting.ENTRY_S + 1)


def test_a_server_with_another_consortiums_certificate_gets_nothing_and_the_client_is_told_to_try_again(tmp_path: Path) -> None:
    (tmp_path / "other.pem").write_bytes(make_tls("other", ["127.0.0.1"], now=NOW).ca_certificate)

    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port, ca=tmp_path / "other.pem") as relayed:
            reader, writer = await relayed.client()
            writer.write(SENT)
            assert (await reader.read(1000)).startswith(b"HTTP/1.1 503 ")
            error = await asyncio.wait_for(relayed.relay.certificate_refused(), 30)
            assert error.code is ErrorCode.CERTIFICATE_REFUSED
            await end(writer)
            await until(relayed.closed)
            assert not server.came
        assert relayed.sent() == 0

    asyncio.run(scene())


def test_a_server_that_is_away_is_no_entry_and_the_client_is_told_to_try_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def ask(relayed: Relayed) -> None:
        reader, writer = await relayed.client()
        writer.write(SENT)
        assert (await reader.read(1000)).startswith(b"HTTP/1.1 503 ")
        await end(writer)

    async def scene() -> None:
        async with serving(tmp_path) as server:
            port = server.port
        async with relaying(tmp_path, port) as relayed:
            for _ in range(3):
                await ask(relayed)
            assert relayed.left() == []
            assert sum(line.startswith("PF403") for line in caplog.messages) == 1, "the log tells of it once"
            async with serving(tmp_path, port=port):
                reader, writer = await relayed.client()
                writer.write(SENT)
                assert await reader.readexactly(len(SENT)) == SENT
                await end(writer)
            assert f"127.0.0.1:{port} is there again" in caplog.messages
            await ask(relayed)
            assert sum(line.startswith("PF403") for line in caplog.messages) == 2
        assert [one.size for one in relayed.left()] == [0, len(SENT)]

    caplog.set_level(logging.INFO)
    asyncio.run(scene())


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_reset_on_either_side_ends_both_and_is_written_down(tmp_path: Path, side: str) -> None:
    async def scene() -> None:
        ended = asyncio.Event()

        async def one_part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1000)
            if side == "server":
                reset(writer)
                return
            writer.write(b"got it")
            with contextlib.suppress(OSError):
                while await reader.read(1000):
                    pass
            ended.set()

        async with serving(tmp_path, one_part) as server, relaying(tmp_path, server.port) as relayed:
            reader, writer = await relayed.client()
            writer.write(b"hello")
            if side == "server":
                with contextlib.suppress(OSError):
                    assert await asyncio.wait_for(reader.read(1000), 30) == b""
            else:
                assert await reader.readexactly(6) == b"got it"
                reset(writer)
                await asyncio.wait_for(ended.wait(), 30)
            await until(relayed.closed)
            await end(writer)
        assert relayed.sent() == 5

    asyncio.run(scene())


def test_a_server_that_takes_nothing_slows_the_client_down_and_fills_no_memory(tmp_path: Path) -> None:
    """What the relay and the kernel's buffers hold of 64 MB that nobody reads."""

    async def scene() -> None:
        async with serving(tmp_path, never_reads) as server, relaying(tmp_path, server.port) as relayed:
            _, writer = await relayed.client()
            part, taken = bytes(1 << 16), 0
            with contextlib.suppress(TimeoutError):
                for _ in range(1024):
                    writer.write(part)
                    await asyncio.wait_for(writer.drain(), 3)
                    taken += len(part)
            assert taken < 24 * 2**20, "the kernel's buffers, and no more"
            writer.transport.abort()
            await end(writer)

    asyncio.run(scene())


@pytest.mark.parametrize("limit", ["STALL_S", "IDLE_S"])
def test_a_peer_that_takes_or_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(relay_module, limit, 0.5)

    async def scene() -> None:
        async with serving(tmp_path, never_reads) as server, relaying(tmp_path, server.port) as relayed:
            reader, writer = await relayed.client()
            if limit == "STALL_S":
                writer.write(bytes(64 * 2**20))
            with contextlib.suppress(OSError):
                assert await asyncio.wait_for(reader.read(10), 60) == b""
            await until(relayed.closed)
            writer.transport.abort()
            await end(writer)

    asyncio.run(scene())


def test_a_client_that_never_finishes_its_handshake_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_HANDSHAKE_S", 1.0)

    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port) as relayed:
            half, half_writer = await relayed.client(plain=True)
            reader, writer = await relayed.client()
            writer.write(SENT)
            assert await reader.readexactly(len(SENT)) == SENT
            with contextlib.suppress(OSError):
                assert await asyncio.wait_for(half.read(10), 30) == b""
            await end(half_writer)
            await end(writer)
            await until(relayed.closed)
            assert server.connections == 1

    asyncio.run(scene())


def test_bytes_that_name_another_place_only_reach_the_fixed_one(tmp_path: Path) -> None:
    async def scene() -> None:
        asked = b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n"
        async with serving(tmp_path) as server, relaying(tmp_path, server.port) as relayed:
            reader, writer = await relayed.client()
            writer.write(asked)
            assert await reader.readexactly(len(asked)) == asked, "the server's own echo"
            await end(writer)
            await until(relayed.closed)
            assert bytes(server.came) == asked

    asyncio.run(scene())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to start a process as another user, which root alone may")
def test_another_user_of_this_machine_is_refused_before_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = (
        "import os, socket, sys; os.setuid(65534)\n"
        "s = socket.socket(); s.settimeout(30); s.connect(('127.0.0.1', int(sys.argv[1])))\n"
        "s.sendall(b'let me out')\n"
        "try: print(s.recv(10))\n"
        "except ConnectionResetError: print(b'')"
    )

    async def scene() -> None:
        async with serving(tmp_path, plain=True) as server, relaying(tmp_path, server.port, tunnel=True) as relayed:
            command = [sys.executable, "-S", "-c", script, str(relayed.port)]
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            said, _ = await process.communicate()
            assert said == b"b''\n"
            assert server.connections == 0
        assert relayed.left() == []

    with caplog.at_level(logging.ERROR):
        asyncio.run(scene())
    assert any(line.startswith("PF450") and "65534" in line for line in caplog.messages)


def test_where_the_system_does_not_tell_who_it_is_nobody_gets_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathfed_client.transport.peer._TABLES", (tmp_path / "no-table",))

    async def scene() -> None:
        async with serving(tmp_path, plain=True) as server, relaying(tmp_path, server.port, tunnel=True) as relayed:
            reader, writer = await relayed.client(plain=True)
            writer.write(b"let me out")
            with contextlib.suppress(OSError):
                assert await reader.read(10) == b""
            await end(writer)
            assert server.connections == 0

    asyncio.run(scene())


def test_too_many_connections_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_MOST_CONNECTIONS", 2)

    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port) as relayed:
            streams = [await relayed.client() for _ in range(2)]
            for reader, writer in streams:
                writer.write(b"hello")
                await reader.readexactly(5)
            third, third_writer = await relayed.client()
            with contextlib.suppress(OSError):
                assert await third.read(10) == b""
            for _, writer in [*streams, (third, third_writer)]:
                await end(writer)
            await until(relayed.closed)
            assert server.connections == 2

    asyncio.run(scene())


def test_a_tunnel_carries_the_clients_own_tls_as_it_is(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port, tunnel=True) as relayed:
            context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
            reader, writer = await asyncio.open_connection("127.0.0.1", relayed.port, ssl=context, server_hostname="127.0.0.1")
            writer.write(SENT)
            assert await reader.readexactly(len(SENT)) == SENT
            await end(writer)
            await until(relayed.closed)
            assert bytes(server.came) == SENT
        assert len(SENT) < relayed.sent() < len(SENT) + 3000, "the handshake and the records' framing are in it"

    asyncio.run(scene())


def test_nothing_leaves_where_nothing_can_be_written_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port) as relayed:
            relayed.relay._record.close()  # type: ignore[attr-defined]
            reader, writer = await relayed.client()
            writer.write(SENT)
            with contextlib.suppress(OSError):
                assert await reader.read(10) == b""
            await end(writer)
            assert not server.came
            assert server.connections == 0

    asyncio.run(scene())
    assert any(line.startswith("PF904") for line in caplog.messages)


def test_a_connection_is_cut_when_its_next_entry_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "ENTRY_BYTES", 100_000)

    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port) as relayed:
            reader, writer = await relayed.client()
            writer.write(b"hello")
            await reader.readexactly(5)

            def full(log: EgressLog, *sent: object) -> None:
                raise HostError(ErrorCode.DISK_FULL, "the disk is full", where=log.path)

            with monkeypatch.context() as patch:
                patch.setattr(EgressLog, "append", full)
                writer.write(bytes(1_000_000))
                with contextlib.suppress(OSError):
                    while await reader.read(1 << 16):
                        pass
                await end(writer)
            assert len(server.came) < 300_000

    asyncio.run(scene())


@contextlib.asynccontextmanager
async def web_proxy(
    answer: bytes = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n",
) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A web proxy: its port, and the heads of what it was asked."""
    asked: list[bytes] = []
    tasks: list[asyncio.Task[None]] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        await writer.drain()
        if b" 200 " not in answer:
            writer.close()
            return
        host, port = asked[-1].split(b" ")[1].decode().split(":")
        there, there_writer = await asyncio.open_connection(host, int(port))
        tasks.extend([asyncio.create_task(pass_on(reader, there_writer)), asyncio.create_task(pass_on(there, writer))])

    listener = await asyncio.start_server(begin, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1], asked
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(("credentials", "header"), [(None, None), ("user:pass word", b"Proxy-Authorization: Basic dXNlcjpwYXNzIHdvcmQ=")])
def test_a_web_proxy_is_asked_for_the_way_and_sees_tls_alone(tmp_path: Path, credentials: str | None, header: bytes | None) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as server, web_proxy() as (port, asked):
            proxy = WebProxy(Address("127.0.0.1", port), credentials)
            async with relaying(tmp_path, server.port, proxy=proxy) as relayed:
                reader, writer = await relayed.client()
                writer.write(SENT)
                assert await reader.readexactly(len(SENT)) == SENT
                await end(writer)
                await until(relayed.closed)
            assert asked[0].splitlines()[0] == f"CONNECT 127.0.0.1:{server.port} HTTP/1.1".encode()
            assert (header in asked[0].splitlines()) == (header is not None)
            assert bytes(server.came) == SENT
        assert {one.via for one in relayed.left()} == {f"127.0.0.1:{port}"}
        assert {one.destination for one in relayed.left()} == {f"127.0.0.1:{server.port}"}
        assert relayed.sent() == len(SENT)

    asyncio.run(scene())


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"HTTP/1.1 403 no\r\n\r\n", b"SSH-2.0-no\r\n\r\n", b""]
)
def test_a_web_proxy_that_refuses_is_told_and_nothing_is_sent(tmp_path: Path, answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as server, web_proxy(answer) as (port, _):
            async with relaying(tmp_path, server.port, proxy=WebProxy(Address("127.0.0.1", port), "user:secret")) as relayed:
                reader, writer = await relayed.client()
                writer.write(SENT)
                assert (await reader.read(1000)).startswith(b"HTTP/1.1 503 ")
                await end(writer)
                await until(relayed.closed)
            assert server.connections == 0
        assert relayed.sent() == 0

    asyncio.run(scene())
    assert any(line.startswith(("PF451", "PF403")) for line in caplog.messages)
    assert "secret" not in caplog.text


def test_a_limit_holds_over_all_connections(tmp_path: Path) -> None:
    """Two connections together stay within what the limit allows for the time that they took."""

    async def scene() -> None:
        rate, size = 400_000.0, 200_000
        loop = asyncio.get_running_loop()
        async with serving(tmp_path) as server, relaying(tmp_path, server.port, bytes_per_s=rate) as relayed:
            streams = [await relayed.client() for _ in range(2)]
            began = loop.time()
            for _, writer in streams:
                writer.write(bytes(size))
            await asyncio.gather(*(reader.readexactly(size) for reader, _ in streams))
            took = loop.time() - began
            assert 2 * size <= rate * (took + 0.25) + 2 * (1 << 16)
            for _, writer in streams:
                await end(writer)
            await until(relayed.closed)

    asyncio.run(scene())


def test_on_a_slow_line_little_waits_in_the_kernel(tmp_path: Path) -> None:
    """SuperNode counts its 30 s for an answer from when it has written a part of 5 MB: it must not have written what is far from sent."""

    async def scene() -> None:
        async with serving(tmp_path) as server, relaying(tmp_path, server.port, bytes_per_s=62_500) as relayed:
            _, writer = await relayed.client()
            writer.transport.set_write_buffer_limits(0)
            part, taken = bytes(1 << 14), 0
            with contextlib.suppress(TimeoutError):
                while taken < 5_000_000:
                    writer.write(part)
                    await asyncio.wait_for(writer.drain(), 3)
                    taken += len(part)
            assert taken - len(server.came) < 62_500 * 25
            writer.transport.abort()
            await end(writer)

    asyncio.run(scene())


def test_closing_the_relay_ends_its_connections_and_writes_them_down(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path, echo) as server:
            async with relaying(tmp_path, server.port) as relayed:
                reader, writer = await relayed.client()
                writer.write(b"hello")
                await reader.readexactly(5)
            with contextlib.suppress(OSError):
                assert await asyncio.wait_for(reader.read(10), 30) == b""
            await end(writer)
            assert relayed.closed()
            assert relayed.sent() == 5
            with pytest.raises(OSError), socket.create_connection(("127.0.0.1", relayed.port), timeout=5):
                pass

    asyncio.run(scene())


def test_a_server_that_is_gone_without_a_word_is_noticed_on_an_idle_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-open: the wire to the server is cut, and nobody says so. The kernel's probes find it, here after seconds and not a minute."""
    monkeypatch.setattr(dial, "_KEEPALIVE", {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 3000})
    script = (
        "import socket, sys\n"
        "listener = socket.create_server((sys.argv[1], 0)); print(listener.getsockname()[1], flush=True)\n"
        "there, _ = listener.accept(); there.sendall(there.recv(100)); there.recv(100)"
    )

    async def scene(made: Building) -> None:
        command = made.command(sys.executable, "-c", script, made.inside)
        server = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        assert server.stdout is not None
        port = int(await server.stdout.readline())
        try:
            async with relaying(tmp_path, port, tunnel=True, host=made.inside) as relayed:
                reader, writer = await relayed.client(plain=True)
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                made.cut()
                with contextlib.suppress(OSError):
                    assert await asyncio.wait_for(reader.read(10), 60) == b""
                await end(writer)
                await until(relayed.closed)
        finally:
            server.kill()
            await server.wait()

    with building() as made:
        asyncio.run(scene(made))


def test_the_kernel_is_told_to_notice_a_peer_that_is_gone(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as server:
            connection = await dial.connect(Address("127.0.0.1", server.port), None)
            with connection:
                assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60

    asyncio.run(scene())
