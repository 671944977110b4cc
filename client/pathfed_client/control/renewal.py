"""A new TLS key and certificate in place of the present ones, at no moment without a pair that fits.

The new key waits beside the present one, its certificate beside the present certificate. Taking them over is two renames: whatever cuts
them short, `certificates.finish` sees from the files how far it came.
"""

from pathfed_client.control.certificates import certificate_times, check_certificate, checked_ca, finish
from pathfed_client.home import SiteHome
from pathfed_client.io.site_keys import KeyKind, certificate_request
from pathfed_client.transport.control_client import ControlClient
from pathfed_common import files
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.protocol import spiffe

#: The share of a certificate's life after which it is renewed.
RENEW_AFTER = 2 / 3


def due(home: SiteHome, now: float) -> bool:
    """Whether two thirds of the certificate's life are over."""
    begin, end = certificate_times(home.certificate_file.read_bytes())
    return now >= begin + RENEW_AFTER * (end - begin)


def renew(home: SiteHome, client: ControlClient) -> float:
    """Renew key and certificate; the new certificate's end, UTC seconds. Connections have to be made anew with them.

    Raises:
        PathfedError: the server's code; PF433, its answer cannot be used; PF401, PF403.
        HostError: PF901, PF904, PF906: files.
    """
    finish(home)
    home.keys.stage(KeyKind.TLS)
    try:
        issued = client.renew(certificate_request(home.keys.tls_key(staged=True), home.name))
    except TransportError as error:
        if error.code is not ErrorCode.CERTIFICATE_REQUEST:
            raise
        # The key has a certificate already, whose answer was lost: ask for another key.
        home.keys.drop_staged(KeyKind.TLS)
        home.keys.stage(KeyKind.TLS)
        issued = client.renew(certificate_request(home.keys.tls_key(staged=True), home.name))
    where = home.server_card.control_address
    trusted = checked_ca(issued.ca, home.ca_file.read_bytes(), where)
    identity = spiffe.site_uri(home.server_card.name, home.name)
    until = check_certificate(issued.certificate, home.keys.tls_key(staged=True), trusted, identity, where)
    files.write_atomic(home.ca_file, trusted)
    files.write_atomic(home.next_certificate_file, issued.certificate)
    finish(home)
    return until
