"""The first contact: finding the consortium's CA by the invitation's pin, and asking to be enrolled.

Nothing of the server is known yet but the pin. One TLS connection is opened that trusts nothing and carries nothing, only to see the
certificates that the server shows; the one with the pinned key becomes the only CA that the enrolment itself trusts.
"""

import asyncio
import os
import ssl
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from pathfed_client.egress.entry import EgressKind
from pathfed_client.egress.outlet import Outlet
from pathfed_client.transport.channel import Calls, Patience, answer_unusable
from pathfed_client.transport.dial import Address, close, connect, proxy_for, secure
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol.invitation import Invitation, ca_pin

_SERVICE = pb.DESCRIPTOR.services_by_name["Enrolment"].full_name


class EnrolmentState(Enum):
    """What became of an enrolment."""

    PENDING = pb.EnrollReply.PENDING
    ADMITTED = pb.EnrollReply.ADMITTED
    REFUSED = pb.EnrollReply.REFUSED


@dataclass(frozen=True)
class Enrolled:
    """The server's answer; the bytes are empty unless the site is admitted.

    Attributes:
        state: what became of it.
        certificate: the site's certificate, PEM.
        ca: the CAs to trust, PEM.
        server_card: the server's signed card.
    """

    state: EnrolmentState
    certificate: bytes
    ca: bytes
    server_card: bytes


def pinned_ca(invitation: Invitation) -> bytes:
    """The CA certificate that the server shows and the invitation pins, PEM.

    Raises:
        TransportError: PF403, nobody answers; PF451, the web proxy refuses; PF431, no certificate that it shows has the pinned key.
    """
    for shown in _shown_certificates(invitation.enrolment_address):
        pem = x509.load_der_x509_certificate(shown).public_bytes(Encoding.PEM)
        if ca_pin(pem) == invitation.ca_pin:
            return pem
    raise TransportError(
        ErrorCode.PIN_DIFFERS,
        "the server does not show the CA that the invitation pins: another server answers, or somebody in between",
        where=invitation.enrolment_address,
        remedy="do not go on; ask the operator by telephone for the address and the CA's fingerprint",
    )


def request_enrolment(
    invitation: Invitation, *, ca: bytes, site_card: bytes, csr: bytes, software: str, outlet: Outlet, patience: Patience | None = None
) -> Enrolled:
    """Ask to be enrolled, or what became of it.

    Raises:
        PathfedError: the server's code, such as PF412; PF401, PF403, PF433: see `Calls.call`.
    """
    calls = Calls(
        invitation.enrolment_address, _SERVICE, grpc.ssl_channel_credentials(root_certificates=ca), outlet=outlet, patience=patience
    )
    request = pb.EnrollRequest(secret=invitation.secret, site_card=site_card, tls_csr_der=csr, software=software)
    try:
        reply = calls.call("Enroll", request, pb.EnrollReply, EgressKind.ENROLMENT)
    finally:
        calls.close()
    try:
        state = EnrolmentState(reply.state)
    except ValueError:
        raise answer_unusable(f"the server answers with the unknown state {reply.state}", invitation.enrolment_address) from None
    return Enrolled(state, reply.certificate_pem, reply.ca_pem, reply.server_card)


def _shown_certificates(address: str) -> list[bytes]:
    """The chain that a server shows, DER, unverified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return asyncio.run(_look(Address.parse(address), context))


async def _look(there: Address, context: ssl.SSLContext) -> list[bytes]:
    proxy = proxy_for(there, os.environ)
    with await connect(there, proxy) as connection:
        _, writer = await secure(connection, there, proxy, context)
        try:
            return _unverified_chain(writer.get_extra_info("ssl_object"))
        finally:
            await close(writer)


def _unverified_chain(secured: Any) -> list[bytes]:
    """`SSLObject.get_unverified_chain` came with Python 3.13; before, the same method is on the object behind it."""
    if hasattr(secured, "get_unverified_chain"):
        return list(secured.get_unverified_chain())
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in secured._sslobj.get_unverified_chain() or ()]
