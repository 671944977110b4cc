"""The relay's process, wired from a site's home: `python -m pathfed_client.relaying HOME PORT [TUNNEL_PORT]`.

It opens the egress record and no other database, and holds no key of the site but the one of its own loopback certificate.
"""

import asyncio
import logging
import os
import signal
import ssl
import sys
from pathlib import Path

from pathfed_client.home import SiteHome
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.transport.dial import Address, proxy_for, trusting
from pathfed_client.transport.relay import CERTIFICATE_REFUSED, LOOPBACK, Relay, Way
from pathfed_client.transport.relay_certificate import RelayCertificate
from pathfed_common.errors import ErrorCode, HostError, PathfedError

_BITS_PER_MBIT = 1_000_000
_log = logging.getLogger(__name__)


def ways_out(home: SiteHome, port: int, tunnel_port: int | None) -> list[Way]:
    """The ways out of a site: to the fleet door, with the relay's TLS, and to the control plane, as it is.

    Raises:
        HostError: PF904, a certificate's file cannot be read; PF905, an address of the server card is not HOST:PORT.
        TransportError: PF451, the web proxy's address cannot be used.
    """
    local = RelayCertificate(home.relay_files)
    inner = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inner.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        inner.load_cert_chain(local.certificate, local.key)
    except (OSError, ssl.SSLError) as error:
        what = f"the relay's certificate cannot be read: {error}"
        raise HostError(ErrorCode.HOME_UNUSABLE, what, where=local.folder, remedy="start the site again: it is made anew") from None
    outer = trusting(home.ca_file)
    outer.minimum_version = ssl.TLSVersion.TLSv1_3
    fleet = _address(home.server_card.fleet_address)
    ways = [Way(port=port, destination=fleet, proxy=proxy_for(fleet, os.environ), inner=inner, outer=outer)]
    if tunnel_port is not None:
        there = _address(home.server_card.control_address)
        ways.append(Way(port=tunnel_port, destination=there, proxy=proxy_for(there, os.environ)))
    return ways


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, str(error), where="server card") from None


async def serve(home: SiteHome, port: int, tunnel_port: int | None) -> PathfedError | None:
    """Serve until asked to end; the error, where a server's certificate was refused."""
    mbit = home.policy.bandwidth_mbit_s
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    with EgressLog(home.egress) as record:
        relay = Relay(record, bytes_per_s=None if mbit is None else mbit * _BITS_PER_MBIT / 8)
        for way in ways_out(home, port, tunnel_port):
            await _listen(relay, way)
        _log.info("ready")
        refused = asyncio.create_task(relay.certificate_refused())
        asked = asyncio.create_task(ended.wait())
        try:
            await asyncio.wait([refused, asked], return_when=asyncio.FIRST_COMPLETED)
            return refused.result() if refused.done() else None
        finally:
            refused.cancel()
            asked.cancel()
            await relay.close()


async def _listen(relay: Relay, way: Way) -> None:
    try:
        await relay.serve(way)
    except OSError as error:
        what = f"the relay cannot listen: {error.strerror}"
        raise HostError(
            ErrorCode.PORT_IN_USE, what, value=f"{LOOPBACK}:{way.port}", remedy="start the site again: it takes another"
        ) from None


def main() -> None:
    """Run the relay."""
    from pathfed_common.console import log_to_stderr

    log_to_stderr()
    home, port, *tunnel = sys.argv[1:]
    try:
        refused = asyncio.run(serve(SiteHome(Path(home)), int(port), int(tunnel[0]) if tunnel else None))
    except PathfedError as error:
        _log.error("%s", error)
        sys.exit(error.exit_status)
    sys.exit(0 if refused is None else CERTIFICATE_REFUSED)


if __name__ == "__main__":
    main()
