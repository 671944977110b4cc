"""What keeps a site from its server, in plain words: looked at before the SuperNode starts, and when it ends.

Flower's SuperNode says `Exit Code: 305` for most of it. A site's IT needs to know whether it is the network, a certificate or the key.
"""

import socket
import ssl
from pathlib import Path

from pathfed_common.errors import ErrorCode, HostError, PathfedError, TransportError
from pathfed_common.files import read_given
from pathfed_common.processes import ProcessEnd

_WITHIN_S = 10.0
_LOG_END = 4000
#: SuperLink's answer to a node it does not let in: an unknown key, or a node whose earlier connection it still counts as open.
_NOT_LET_IN = "[code: 2004]"
_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"


def check_server(address: str, ca_file: Path) -> None:
    """Open one TLS connection to HOST:PORT and check the server's certificate against the pinned CA.

    Raises:
        TransportError: PF401, the certificate is not the consortium's, is for another host, or has expired; PF403, nobody answers.
        HostError: PF904, the pinned CA's file cannot be read or holds no certificate.
    """
    host, _, port = address.rpartition(":")
    context = _trusting(ca_file)
    try:
        with (
            socket.create_connection((host, int(port)), timeout=_WITHIN_S) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return
    except ssl.SSLCertVerificationError as error:
        raise TransportError(
            ErrorCode.CERTIFICATE_REFUSED,
            f"the server's certificate is refused: {error.verify_message}",
            where=address,
            remedy="ask the operator for a new server card; do not go on with this one",
        ) from error
    except (OSError, ValueError) as error:
        raise TransportError(
            ErrorCode.SERVER_UNREACHABLE,
            f"the server cannot be reached: {error}",
            where=address,
            remedy="check the address, the firewall (outbound TCP) and that the server runs",
        ) from error


def _trusting(ca_file: Path) -> ssl.SSLContext:
    read_given(ca_file)
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except ssl.SSLError:
        raise HostError(
            ErrorCode.HOME_UNUSABLE,
            "holds no certificate",
            where=ca_file,
            remedy="it is the consortium's CA from the server card; make the site's home again with `pathfed-site init`",
        ) from None


def explain(end: ProcessEnd, address: str) -> PathfedError:
    """Why a SuperNode ended, as far as its log tells."""
    try:
        text = end.log.read_text(errors="replace")[-_LOG_END:]
    except OSError:
        text = ""
    if _CERTIFICATE in text:
        return TransportError(ErrorCode.CERTIFICATE_REFUSED, "the server's certificate is refused", where=address)
    if _NOT_LET_IN in text:
        return TransportError(
            ErrorCode.NODE_KEY_UNKNOWN,
            "the server does not let this site's node in: it does not know the node key, or still counts an earlier connection as open",
            where=address,
            remedy="wait a minute; if it stays so, ask the operator whether this site's card was added",
        )
    return end.error()
