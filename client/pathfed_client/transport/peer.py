"""Whose process is at the other end of a loopback connection.

Everybody on a machine can reach a port of its loopback. Linux lists the owner of each TCP socket, so the relay can refuse whoever is not
the user it runs as. Root can read the owner's keys anyway, and can become that user.
"""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

_ESTABLISHED = "01"
#: A table is longer than one read of the kernel's, and an entry can slip from one read into the next when another goes between them.
_LOOKS = 3
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def owner_of(peer: tuple[str, int], here: tuple[str, int]) -> int | None:
    """User id that owns the socket at `peer` (IPv4 address and port) which is connected to `here`; None where it is not known.

    Not known: no such connection (any more), or a system without Linux's tables.
    """
    wanted = {(_written(peer), _written(here)), (_mapped(peer), _mapped(here))}
    for _ in range(_LOOKS):
        for local, remote, state, owner in _sockets():
            if state == _ESTABLISHED and (local, remote) in wanted:
                return owner
    return None


def _sockets() -> Iterator[tuple[str, str, str, int]]:
    for table in _TABLES:
        try:
            lines = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            yield fields[1], fields[2], fields[3], int(fields[7])


def _written(address: tuple[str, int]) -> str:
    """As the kernel writes it: the address as a number of this machine's byte order, in hexadecimal."""
    number = int.from_bytes(socket.inet_aton(address[0]), _byte_order())
    return f"{number:08X}:{address[1]:04X}"


def _mapped(address: tuple[str, int]) -> str:
    """The same as seen through a socket of IPv6."""
    marker = int.from_bytes(b"\x00\x00\xff\xff", _byte_order())
    return f"{0:016X}{marker:08X}{_written(address)}"


def _byte_order() -> Literal["little", "big"]:
    return sys.byteorder
