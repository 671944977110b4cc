"""What left this building: a site behind one wire, a packet capture on that wire, and the site's own record of what it sent.

The site runs in a network namespace of its own, the server outside it. Everything on the wire is captured, decrypted with a TLS key log
of the relay, and compared with the egress record: destinations, bytes, contents. Wants root, for the namespace and the capture.
"""

import base64
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flower_stream import pushed_messages
from packet_capture import Building, Capture, Flow, building
from tls_decrypt import RECORD_OVERHEAD, KeyLog, client_said, records

from pathfed_client.egress.entry import EgressKind, Outgoing
from pathfed_client.io.egress_log import EgressLog
from pathfed_common import digest
from pathfed_common.processes import ProcessSpec, Supervisor, accepts_connections
from pathfed_common.protocol import wire

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.timeout(900)
#: What the client's side of a TLS 1.3 handshake and its goodbye take, bytes, beside the framing of each record.
HANDSHAKE = 2500


@dataclass(frozen=True)
class Sent:
    """One connection as the wire shows it, and as TLS hid it."""

    flow: Flow
    wire: bytes = field(repr=False)
    said: bytes = field(repr=False)

    @classmethod
    def of(cls, flow: Flow, keys: KeyLog, fleet: str) -> "Sent":
        """The control plane brings TLS of its own, whose keys stay with it: what the relay carried there is what is on the wire."""
        data = flow.sent()
        return cls(flow, data, client_said(data, keys) if flow.place == fleet else data)


@dataclass(frozen=True)
class Compared:
    """What a capture and a record have to say of each other.

    Attributes:
        unlisted: connections on the wire that no entries account for, to the last byte.
        unseen: connections of the record that were not on the wire.
    """

    unlisted: list[str]
    unseen: list[str]


def compare(seen: Sequence[Sent], record: Sequence[Outgoing]) -> Compared:
    """Lay connections on the wire against connections of the record: destination, bytes, and the digest of every part."""
    listed: dict[str, list[Outgoing]] = {}
    for one in record:
        if one.connection is not None:
            listed.setdefault(one.connection, []).append(one)
    unlisted = []
    for sent in seen:
        name = next((name for name, entries in listed.items() if _accounts(entries, sent)), None)
        if name is None:
            unlisted.append(f"{sent.flow.place} from port {sent.flow.port}: {len(sent.said)} bytes")
        else:
            del listed[name]
    return Compared(unlisted, sorted(listed))


def _accounts(entries: Sequence[Outgoing], sent: Sent) -> bool:
    start = 0
    for one in entries:
        if one.destination != sent.flow.place or digest.of_bytes(sent.said[start : start + one.size]) != one.digest:
            return False
        start += one.size
    return start == len(sent.said)


@dataclass(frozen=True)
class Scene:
    """A round that was answered, all that was seen of it on the wire, and where the site's home is."""

    home: Path
    server: str
    ports: Mapping[str, int]
    capture: Capture
    seen: Sequence[Sent]
    bypass: int

    def place(self, port: str) -> str:
        """HOST:PORT of the server's fleet, control or enrolment port."""
        return f"{self.server}:{self.ports[port]}"

    def record(self) -> list[Outgoing]:
        with closing(EgressLog(self.home / "egress.db")) as log:
            log.verified()
            return [entry.sent for entry in log.entries()]

    def of_the_relay(self) -> list[Sent]:
        """What was seen but for what slipped by, and for enrolment, which a command does by itself before there is a relay."""
        return [sent for sent in self.seen if sent.flow.port != self.bypass and sent.flow.place != self.place("enrolment")]


def run(*words: object, within_s: float = 300) -> Any:
    """Run a command that prints JSON; its result."""
    done = subprocess.run([*(str(word) for word in words), "--json"], capture_output=True, text=True, timeout=within_s, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


#: Sends a few bytes to the server, round the relay: what software that somebody planted at a site would do.
BYPASS = """
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
with socket.create_connection((sys.argv[2], int(sys.argv[3]))) as plain, context.wrap_socket(plain, server_hostname=sys.argv[2]) as there:
    there.sendall(b"POST /v1/fleet/nothing HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 6\\r\\nConnection: close\\r\\n\\r\\nsecret")
    port = there.getsockname()[1]
    while there.recv(1000):
        pass
print(port)
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, plan_file: Path, hospitals: Path) -> Iterator[Scene]:
    with building() as made:
        yield _play(made, tmp_path_factory.mktemp("egress"), plan_file, next(iter(sorted(hospitals.iterdir()))))


def _play(made: Building, root: Path, plan_file: Path, hospital: Path) -> Scene:
    """Enrol a site and run one round with the capture on, let something slip round the relay, and end the site before the capture."""
    server, home = root / "server", root / "site"
    run(BIN / "pathfed-server", "init", "--consortium", "capture", "--host", made.outside, "--listen", "0.0.0.0", "--home", server)
    settings = tomllib.loads((server / "server.toml").read_text())
    ports = {name: int(settings[f"{name}_port"]) for name in ("fleet", "control", "enrolment")}
    keys = root / "keys.log"
    keys.touch(mode=0o600)
    logged = {"SSLKEYLOGFILE": str(keys)}
    outside, inside = Supervisor(), Supervisor()
    try:
        argv = [str(BIN / "pathfed-server"), "start", "--home", str(server), "--json"]
        ready = lambda: (server / "ports.json").exists() and accepts_connections(made.outside, ports["fleet"])  # noqa: E731 - used once
        outside.start(ProcessSpec(name="server", argv=argv, log=root / "server.log", ready=ready))
        with Capture(made) as capture:
            _enrol(made, server, home, hospital)
            plan = _approved_plan(root, server, home, plan_file)
            start = made.command(BIN / "pathfed-site", "start", "--home", home, "--json")
            inside.start(ProcessSpec(name="site", argv=start, log=root / "site.log", environment=logged))
            logs = [root / "server.log", root / "site.log"]
            _until(lambda: run(BIN / "pathfed-server", "plan", "list", "--home", server)[0]["approved_by"] == ["site-a"], logs)
            run(BIN / "pathfed-server", "run", "start", plan, "--name", "one", "--home", server)
            _until(lambda: _state(server) not in ("planned", "running"), logs)
            assert _state(server) == "finished"
            bypass = made.command(sys.executable, "-c", BYPASS, home / "ca.pem", made.outside, ports["fleet"])
            done = subprocess.run(bypass, env={**os.environ, **logged}, capture_output=True, text=True, check=True)
            inside.stop(grace_s=30)
            time.sleep(1)  # what is on the wire reaches the capture
    finally:
        inside.stop()
        outside.stop()
    log = KeyLog(keys)
    seen = [Sent.of(flow, log, f"{made.outside}:{ports['fleet']}") for flow in capture.flows()]
    return Scene(home, made.outside, ports, capture, seen, int(done.stdout))


def _enrol(made: Building, server: Path, home: Path, hospital: Path) -> None:
    """As a hospital and an operator do it, with the site's side inside the building."""
    options = ("--name", "site-a", "--slides", hospital / "slides", "--patients", hospital / "patients.csv", "--no-reply-slots")
    run(BIN / "pathfed-site", "init", *options, "--max-epsilon", 50, "--home", home)
    invitation = run(BIN / "pathfed-server", "invite", "site-a", "--home", server)["invitation"]
    enroll = made.command(BIN / "pathfed-site", "enroll", invitation, "--no-wait", "--home", home)
    asked = run(*enroll)
    assert not asked["admitted"]
    run(BIN / "pathfed-server", "sites", "admit", "site-a", asked["fingerprint"], "--home", server)
    assert run(*enroll)["admitted"]


def _approved_plan(root: Path, server: Path, home: Path, plan_file: Path) -> str:
    """Digest of a plan of one round that the site approves; its word travels when it starts."""
    plan, signed = root / "plan.toml", root / "plan.dsse"
    plan.write_text(plan_file.read_text().replace("count = 2", "count = 1").replace("quorum = 2", "quorum = 1"))
    run(BIN / "pathfed-server", "plan", "publish", plan, "--out", signed, "--home", server)
    run(BIN / "pathfed-site", "scan", signed, "--workers", 1, "--home", home)
    approved = run(BIN / "pathfed-site", "approve", signed, "--patients-at-least", 4, "--out", root / "approval.dsse", "--home", home)
    return str(approved["plan"])


def _state(server: Path) -> str:
    return str(run(BIN / "pathfed-server", "run", "status", "one", "--home", server)["state"])


def _until(look: Callable[[], bool], logs: Sequence[Path]) -> None:
    end = time.monotonic() + 400
    while not look():
        assert time.monotonic() < end, "".join(log.read_text()[-3000:] for log in logs)
        time.sleep(0.5)


def test_nothing_but_tcp_to_the_servers_three_ports_leaves_the_building(scene: Scene) -> None:
    assert scene.capture.others <= {"arp"}
    places = {scene.place(port) for port in ("fleet", "control", "enrolment")}
    assert {flow.place for flow in scene.capture.flows()} == places
    assert {one.destination for one in scene.record()} == places


def test_every_connection_on_the_wire_is_in_the_record_to_the_byte_and_the_reverse(scene: Scene) -> None:
    seen = scene.of_the_relay()
    assert compare(seen, scene.record()) == Compared([], [])
    assert sum(len(sent.said) for sent in seen) == sum(one.size for one in scene.record() if one.connection is not None) > 1_000_000


def test_the_wire_carries_what_the_record_says_and_framing_alone(scene: Scene) -> None:
    for sent in scene.seen:
        if sent.flow.place != scene.place("fleet"):
            continue
        framing = RECORD_OVERHEAD * sum(1 for _ in records(sent.wire))
        assert len(sent.said) <= len(sent.wire) <= len(sent.said) + framing + HANDSHAKE


def test_the_bytes_of_the_answer_in_the_decrypted_stream_have_the_digests_of_the_record(scene: Scene) -> None:
    listed = {one.kind: one for one in scene.record() if one.run == "one"}
    assert set(listed) == {EgressKind.UPDATE, EgressKind.STATEMENT}
    (message,) = pushed_messages(sent.said for sent in scene.of_the_relay() if sent.flow.place == scene.place("fleet"))
    assert len(message.content) == 1, "a statement or a code, and no update"
    statement = message.content.config_records[wire.REPLY][wire.ENVELOPE]
    assert isinstance(statement, bytes)
    assert (listed[EgressKind.STATEMENT].digest, listed[EgressKind.STATEMENT].size) == (digest.of_bytes(statement), len(statement))
    stated = json.loads(base64.b64decode(json.loads(statement)["payload"]))
    update = listed[EgressKind.UPDATE]
    assert update.digest == "sha256:" + stated["subject"][0]["digest"]["sha256"]
    assert (update.run, update.round_index, update.destination) == ("one", 1, scene.place("control"))
    assert update.epsilon_charged
    carried = [len(sent.said) for sent in scene.of_the_relay() if sent.flow.place == scene.place("control")]
    assert sum(1 for size in carried if size > update.size) == 1, "it went over one connection, and no byte of it twice"


def test_messages_of_the_control_plane_are_listed_and_fit_into_what_the_wire_carried(scene: Scene) -> None:
    messages = [one for one in scene.record() if one.connection is None]
    kinds = {one.kind for one in messages}
    assert {EgressKind.ENROLMENT, EgressKind.DECISION, EgressKind.REPORT, EgressKind.QUERY, EgressKind.UPDATE_MANIFEST} <= kinds
    assert not {EgressKind.REFUSAL, EgressKind.UPDATE_AGAIN} & kinds
    for port in ("control", "enrolment"):
        listed = sum(one.size for one in messages if one.destination == scene.place(port))
        count = sum(1 for one in messages if one.destination == scene.place(port))
        flows = [sent for sent in scene.seen if sent.flow.place == scene.place(port)]
        carried = sum(len(sent.wire) for sent in flows)
        # Beside the messages: two certificates in a handshake; for each call its headers, window updates and pings; the framing of an
        # update's bytes, and the acknowledgements of a base state's, which is as long.
        assert listed < carried < listed + 6000 * len(flows) + 1500 * count + listed // 50


def test_a_message_that_went_round_the_relay_is_found(scene: Scene) -> None:
    """The planted fault: real bytes, from inside the building, to the right server, that nobody wrote down."""
    found = compare([sent for sent in scene.seen if sent.flow.place != scene.place("enrolment")], scene.record())
    (unlisted,) = found.unlisted
    assert f"from port {scene.bypass}:" in unlisted
    assert not found.unseen


@pytest.mark.parametrize("fault", ["an entry is missing", "a byte more", "another digest", "another place"])
def test_a_record_that_says_less_or_otherwise_is_found(scene: Scene, fault: str) -> None:
    seen = scene.of_the_relay()
    record = [one for one in scene.record() if one.connection is not None]
    largest = max(range(len(record)), key=lambda number: record[number].size)
    one = record[largest]
    changed = {
        "an entry is missing": [],
        "a byte more": [replace(one, size=one.size + 1)],
        "another digest": [replace(one, digest=digest.of_bytes(b"other"))],
        "another place": [replace(one, destination="10.0.0.1:1")],
    }[fault]
    assert compare(seen, [*record[:largest], *changed, *record[largest + 1 :]]).unlisted
