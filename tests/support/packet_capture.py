"""A building of its own: a network namespace behind one wire, and everything that goes over that wire.

Wants the rights of root. The namespace stands for the hospital, the wire for its line out; nothing else of the machine is on it.
"""

import contextlib
import secrets
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

_EVERYTHING = 0x0003
_IPV4, _ARP = 0x0800, 0x0806
_TCP = 6
_RCVBUFFORCE = 33
_BUFFER = 256 * 2**20


@dataclass
class Flow:
    """What one TCP connection carried out of the building.

    Attributes:
        place: HOST:PORT it went to.
        port: its own port.
    """

    place: str
    port: int
    parts: dict[int, bytes] = field(default_factory=dict)
    start: int | None = None

    def sent(self) -> bytes:
        """The payload in order, each byte once.

        Raises:
            ValueError: the capture missed a part of it.
        """
        data = b""
        for offset, part in sorted(self.parts.items()):
            if offset > len(data):
                raise ValueError(f"bytes {len(data)} to {offset} of port {self.port} were not captured")
            data += part[len(data) - offset :] if offset < len(data) else part
        return data


@dataclass
class Building:
    """The namespace and its wire.

    Attributes:
        name: of the namespace.
        outside: address of this end of the wire, where the server is.
        inside: the building's own address.
        interface: this end of the wire.
    """

    name: str
    outside: str
    inside: str
    interface: str

    def command(self, *words: object) -> list[str]:
        """A command that runs inside."""
        return ["ip", "netns", "exec", self.name, *(str(word) for word in words)]

    def cut(self) -> None:
        """Cut the wire: nobody is told."""
        subprocess.run(["ip", "link", "set", self.interface, "down"], check=True)

    def join(self) -> None:
        """Make the wire whole again."""
        subprocess.run(["ip", "link", "set", self.interface, "up"], check=True)


@contextlib.contextmanager
def building() -> Iterator[Building]:
    """Make one; skips the test where that is not permitted."""
    tag = secrets.token_hex(3)
    net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
    made = Building(f"pf-{tag}", f"{net}.1", f"{net}.2", f"pfo{tag}")
    inner = f"pfi{tag}"
    steps = [
        f"ip netns add {made.name}",
        f"ip link add {made.interface} type veth peer name {inner}",
        f"ip link set {inner} netns {made.name}",
        f"ip addr add {made.outside}/30 dev {made.interface}",
        f"ip link set {made.interface} up",
        f"ip netns exec {made.name} ip addr add {made.inside}/30 dev {inner}",
        f"ip netns exec {made.name} tee /proc/sys/net/ipv6/conf/{inner}/disable_ipv6",  # it would ask for neighbours on the wire
        f"ip netns exec {made.name} ip link set {inner} up",
        f"ip netns exec {made.name} ip link set lo up",
    ]
    try:
        for step in steps:
            try:
                done = subprocess.run(step.split(), input="1", capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("needs the command `ip` (iproute2)")
            if done.returncode and "ipv6" not in step:  # there may be none
                pytest.skip(f"needs the right to make a network namespace, as root has it: {done.stderr.strip()}")
        yield made
    finally:
        for step in (f"ip link del {made.interface}", f"ip netns del {made.name}"):
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(step.split(), capture_output=True, check=False)


class Capture:
    """All that comes out of a building while it lasts: TCP by connection, and whatever else there is by kind."""

    def __init__(self, made: Building) -> None:
        self._building = made
        self._flows: dict[tuple[str, int, int], Flow] = {}
        self.others: set[str] = set()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERYTHING))
        self._socket.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER)
        self._socket.bind((made.interface, 0))
        self._socket.settimeout(0.5)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Capture":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        received, dropped = struct.unpack("II", self._socket.getsockopt(263, 6, 8))  # SOL_PACKET, PACKET_STATISTICS
        self._socket.close()
        assert received > 0
        assert dropped == 0, "the capture itself lost packets"

    def flows(self) -> list[Flow]:
        """One for each TCP connection that was opened from inside."""
        return list(self._flows.values())

    def _watch(self) -> None:
        while True:
            try:
                frame, address = self._socket.recvfrom(1 << 18)
            except TimeoutError:
                if self._ended.is_set():
                    return
                continue
            if address[2] != socket.PACKET_OUTGOING:  # this end sends what goes in, and receives what comes out
                self._see(frame)

    def _see(self, frame: bytes) -> None:
        kind = int.from_bytes(frame[12:14], "big")
        if kind != _IPV4:
            self.others.add("arp" if kind == _ARP else f"ethertype {kind:04x}")
            return
        packet = frame[14:]
        header = (packet[0] & 15) * 4
        packet = packet[: int.from_bytes(packet[2:4], "big") or len(packet)]  # 0: larger than 64 kB
        to = socket.inet_ntoa(packet[16:20])
        if packet[9] != _TCP:
            self.others.add(f"protocol {packet[9]} to {to}")
            return
        segment = packet[header:]
        port, there, number = struct.unpack("!HHI", segment[:8])
        flags, data = segment[13], segment[(segment[12] >> 4) * 4 :]
        flow = self._flows.get((to, there, port))
        if flags & 2:  # SYN
            if flow is None:
                self._flows[to, there, port] = Flow(f"{to}:{there}", port, start=number + 1)
            return
        if flow is not None and flow.start is not None and data:
            offset = (number - flow.start) % 2**32
            if len(data) > len(flow.parts.get(offset, b"")):
                flow.parts[offset] = data
