"""The enrolment port: the one method that somebody without a certificate may call."""

from dataclasses import dataclass, field
from typing import Protocol

from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol.invitation import SECRET_BYTES
from pathfed_server.transport.authority import REQUEST_LIMIT as LONGEST_CSR
from pathfed_server.transport.grpc_service import Call, Door, Handler
from pathfed_server.transport.software import check_software

ENROLMENT = "pathfed.control.v1.Enrolment"
#: A site card has about 700 bytes.
_LONGEST_CARD = 16 * 1024

_STATES = {
    "pending": pb.EnrollReply.State.PENDING,
    "admitted": pb.EnrollReply.State.ADMITTED,
    "refused": pb.EnrollReply.State.REFUSED,
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What somebody asks for with an invitation. Nothing but its form has been checked. The secret does not show in `repr`."""

    secret: bytes = field(repr=False)
    site_card: bytes
    tls_csr: bytes
    software: str


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What became of it: "pending", "admitted" or "refused"; certificate, authorities (PEM) and the server's card where admitted."""

    state: str
    certificate: bytes = b""
    authorities: bytes = b""
    server_card: bytes = b""


class EnrolmentDesk(Protocol):
    """Who decides what an invitation is good for."""

    def enroll(self, asked: Asked) -> Answered:
        """Take a request, or say what became of it; the same request again gives the present state.

        Raises:
            PathfedError: the request is refused; see the code.
        """
        ...


def enrolment_methods(desk: EnrolmentDesk, door: Door) -> dict[str, Handler]:
    """The methods of `ENROLMENT`."""

    def enroll(call: Call, request: pb.EnrollRequest) -> pb.EnrollReply:
        if len(request.secret) != SECRET_BYTES or len(request.site_card) > _LONGEST_CARD or len(request.tls_csr_der) > LONGEST_CSR:
            raise TransportError(ErrorCode.REQUEST_REFUSED, "a field is too long, or is not of its length", where=call.address)
        asked = Asked(
            secret=request.secret,
            site_card=request.site_card,
            tls_csr=request.tls_csr_der,
            software=check_software(request.software),
        )
        answered = desk.enroll(asked)
        return pb.EnrollReply(
            state=_STATES[answered.state],
            certificate_pem=answered.certificate,
            ca_pem=answered.authorities,
            server_card=answered.server_card,
        )

    return {"Enroll": door.method(pb.EnrollRequest, enroll)}
