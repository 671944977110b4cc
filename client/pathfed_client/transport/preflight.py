"""What keeps a site from its server, in plain words: looked at before the SuperNode starts, and when it ends.

Flower's SuperNode says `Exit Code: 305` for most of it. A site's IT needs to know whether it is the network, a certificate or the key.
"""

import asyncio
import os
import secrets
import ssl
from pathlib import Path

from pathfed_client.egress.connection import ConnectionCount
from pathfed_client.egress.outlet import EgressPort
from pathfed_client.transport.dial import Address, close, connect, proxy_for, secure, trusting
from pathfed_client.transport.relay import CERTIFICATE_REFUSED
from pathfed_common.errors import ErrorCode, PathfedError, TransportError
from pathfed_common.processes import ProcessEnd

_LOG_END = 4000
#: SuperLink's answer to a node it does not let in: an unknown key, or a node whose earlier connection it still counts as open.
_NOT_LET_IN = "[code: 2004]"


def check_server(address: str, ca_file: Path, record: EgressPort) -> None:
    """Open one TLS connection to HOST:PORT as the relay does, check the server's certificate against the pinned CA, and say nothing.

    It is written down like the relay's: what leaves is the handshake alone.

    Raises:
        TransportError: PF401, the certificate is not the consortium's, is for another host, or has expired; PF403, nobody answers; PF451,
            the web proxy refuses.
        HostError: PF904, the pinned CA's file cannot be read or holds no certificate; PF901, PF904, PF913, the record cannot be written.
    """
    tls = trusting(ca_file)
    try:
        there = Address.parse(address)
    except ValueError as error:
        raise TransportError(ErrorCode.SERVER_UNREACHABLE, f"the server cannot be reached: {error}", where=address) from error
    asyncio.run(_shake_hands(there, tls, record))


async def _shake_hands(there: Address, tls: ssl.SSLContext, record: EgressPort) -> None:
    proxy = proxy_for(there, os.environ)
    connection = await connect(there, proxy)
    via = None if proxy is None else str(proxy.address)
    count = ConnectionCount(destination=str(there), connection=f"check-{secrets.token_hex(4)}", via=via, now=0.0)
    with connection:
        record.append(count.opened())
        try:
            _, writer = await secure(connection, there, proxy, tls)
            await close(writer)
        finally:
            record.append(count.entry(0.0, closed=True))


def explain(end: ProcessEnd, address: str) -> PathfedError:
    """Why a SuperNode, or the relay, ended, as far as its log tells."""
    try:
        text = end.log.read_text(errors="replace")[-_LOG_END:]
    except OSError:
        text = ""
    if end.name == "relay" and end.status == CERTIFICATE_REFUSED:
        return TransportError(ErrorCode.CERTIFICATE_REFUSED, "the server's certificate is refused", where=address)
    if _NOT_LET_IN in text:
        return TransportError(
            ErrorCode.NODE_KEY_UNKNOWN,
            "the server does not let this site's node in: it does not know the node key, or still counts an earlier connection as open",
            where=address,
            remedy="wait a minute; if it stays so, ask the operator whether this site's card was added",
        )
    return end.error()
