"""One end of a transfer, in a process of its own, for `bulk_transfer.py`: prints one JSON line, seconds and peak memory.

    python _bulk_peer.py fetch HOME OFFER TUNNEL            pathfed's site: a base state, verified, under its name
    python _bulk_peer.py deliver HOME OFFER TUNNEL UPDATE   the same of an update
    python _bulk_peer.py serve PORT-FILE CERT KEY FILE      a plain TLS socket that sends a file, once to whoever comes
    python _bulk_peer.py take PORT CA FILE WHOLE            the other end: writes, hashes, flushes as a receiver of pathfed does

Both receivers hash what arrives in shards of 64 MiB and flush each to the disk; where a base state is fetched (WHOLE), the whole file is
read and hashed once more, as the site does before it is used.
"""

import hashlib
import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pathfed_common.part_file import file_digest, manifest_of
from pathfed_common.shards import PIECE_BYTES, SHARD_BYTES

_HOST = "127.0.0.1"


def fetch(home: str, offer: str, tunnel: str) -> float:
    """Seconds until the base state lies verified in its place."""
    from pathfed_client.bulk import SiteBulk
    from pathfed_client.egress.outlet import Outlet
    from pathfed_client.home import SiteHome
    from pathfed_client.io.egress_log import EgressLog
    from pathfed_common.protocol.messages import RoundOffer

    with EgressLog(SiteHome(Path(home)).egress) as record:
        bulk = SiteBulk(SiteHome(Path(home)), Outlet(record), tunnel=int(tunnel) or None)
        began = time.perf_counter()
        bulk.fetch(RoundOffer.from_bytes(Path(offer).read_bytes()))
        return time.perf_counter() - began


def deliver(home: str, offer: str, tunnel: str, update: str) -> float:
    """Seconds until the update lies at the server. Its manifest is made before, as the site makes it before its time slot."""
    from pathfed_client.bulk import SiteBulk
    from pathfed_client.egress.outlet import Outlet
    from pathfed_client.home import SiteHome
    from pathfed_client.io.egress_log import EgressLog
    from pathfed_common.protocol.messages import RoundOffer

    manifest = manifest_of(Path(update))
    with EgressLog(SiteHome(Path(home)).egress) as record:
        bulk = SiteBulk(SiteHome(Path(home)), Outlet(record), tunnel=int(tunnel) or None)
        began = time.perf_counter()
        bulk.deliver(Path(update), manifest, RoundOffer.from_bytes(Path(offer).read_bytes()))
        return time.perf_counter() - began


def serve(port_file: str, certificate: str, key: str, path: str) -> float:
    """Send a file to the one that connects; seconds of sending."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server((_HOST, 0)) as listener:
        Path(port_file).with_suffix(".part").write_text(str(listener.getsockname()[1]))
        Path(port_file).with_suffix(".part").replace(port_file)
        plain, _ = listener.accept()
        with context.wrap_socket(plain, server_side=True) as there, Path(path).open("rb", buffering=0) as file:
            began = time.perf_counter()
            while piece := file.read(PIECE_BYTES):
                there.sendall(piece)
            with suppress(OSError):  # the other end leaves when it has all
                there.unwrap()
            return time.perf_counter() - began


def take(port: str, ca: str, path: str, whole: str) -> float:
    """Receive a file; seconds from the connection to the file that is flushed."""
    context = ssl.create_default_context(cafile=ca)
    buffer = memoryview(bytearray(PIECE_BYTES))
    began = time.perf_counter()
    with socket.create_connection((_HOST, int(port))) as plain, context.wrap_socket(plain, server_hostname=_HOST) as there:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        shard, here = hashlib.sha256(), 0
        while read := there.recv_into(buffer, min(PIECE_BYTES, SHARD_BYTES - here % SHARD_BYTES)):
            os.write(file, buffer[:read])
            shard.update(buffer[:read])
            here += read
            if here % SHARD_BYTES == 0:
                os.fsync(file)
                shard = hashlib.sha256()
        os.fsync(file)
        os.close(file)
    if whole == "whole":
        file_digest(Path(path))
    return time.perf_counter() - began


WAYS: dict[str, Callable[..., float]] = {"fetch": fetch, "deliver": deliver, "serve": serve, "take": take}

if __name__ == "__main__":
    took = WAYS[sys.argv[1]](*sys.argv[2:])
    peak_kb = int(Path("/proc/self/status").read_text(encoding="ascii").split("VmHWM:")[1].split()[0])  # of this program, not its parent
    print(json.dumps({"seconds": took, "peak_mb": peak_kb / 1000}), flush=True)
