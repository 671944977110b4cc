"""The control port: what an enrolled site may ask and say, and how the server knows that it is that site.

Whose call it is, the TLS certificate says and nothing else: its SPIFFE id names the site, and `Members` is asked at every call whether
this very certificate still stands. So a revocation ends open connections too, at their next call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cryptography import x509
from google.protobuf.message import Message

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol import spiffe
from pathfed_server.provenance.log_ports import LogService
from pathfed_server.transport.authority import REQUEST_LIMIT as LONGEST_CSR
from pathfed_server.transport.authority import fingerprint, serial_text
from pathfed_server.transport.grpc_service import Call, Door, Handler
from pathfed_server.transport.limits import RateLimit
from pathfed_server.transport.software import check_software

CONTROL = "pathfed.control.v1.Control"
_HASH_BYTES = 32
_LARGEST_LOG = 2**62
_STATES = ("running", "stopped")
Request = TypeVar("Request", bound=Message)


@dataclass(frozen=True, kw_only=True)
class Presented:
    """A certificate as it came: serial (hex), digest of its DER, and the site that its SPIFFE id names."""

    serial: str
    fingerprint: Digest
    site: SiteName


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A site that is enrolled and calls with a certificate that stands.

    Attributes:
        site: the site.
        serial: of the certificate it calls with.
        certificate_until: when that one ends, UTC seconds.
    """

    site: SiteName
    serial: str
    certificate_until: float


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A certificate and the authorities to trust, PEM."""

    certificate: bytes
    authorities: bytes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a site in one round that it was asked in. `code`: why it does not count, or None."""

    run: RunName
    round_index: int
    state: str
    code: str | None
    offered_at: float


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the server wants a site to know: to renew its certificate now, whether it is suspended, and its last rounds."""

    renew: bool
    suspended: bool
    outcomes: Sequence[Outcome]


class ControlDesk(Protocol):
    """Who answers the sites. Every method may be called from several threads at once, and raises PathfedError where it refuses."""

    consortium: str

    def caller(self, presented: Presented) -> Caller:
        """Who calls; asked at every call.

        Raises:
            TransportError: PF415, the certificate does not stand, or its site is not enrolled.
        """
        ...

    def now(self) -> float:
        """The server's clock, UTC seconds."""
        ...

    def server_card(self) -> bytes:
        """The server's signed card."""
        ...

    def renew(self, caller: Caller, tls_csr: bytes) -> Certified:
        """A certificate for a new key."""
        ...

    def rotate_key(self, caller: Caller, *, site_card: bytes, rotation: bytes, continuity: bytes) -> None:
        """A new evidence key or Flower node key."""
        ...

    def plans(self) -> Sequence[bytes]:
        """Every published plan, signed."""
        ...

    def decide(self, caller: Caller, envelope: bytes) -> None:
        """The site's signed word on a plan."""
        ...

    def report(self, caller: Caller, *, software: str, state: str) -> Told:
        """What the site is and does; what the server wants it to know."""
        ...


class ControlService:
    """The methods of `CONTROL`."""

    def __init__(self, desk: ControlDesk, log: LogService, door: Door, limit: RateLimit) -> None:
        """Take the parts; `limit` counts by site."""
        self._desk, self._log, self._door, self._limit = desk, log, door, limit

    def methods(self) -> dict[str, Handler]:
        """Every method by its name."""
        return {
            "GetServerCard": self._method(pb.GetServerCardRequest, self._server_card),
            "Renew": self._method(pb.RenewRequest, self._renew),
            "RotateKey": self._method(pb.RotateKeyRequest, self._rotate_key),
            "ListPlans": self._method(pb.ListPlansRequest, self._plans),
            "Decide": self._method(pb.DecideRequest, self._decide),
            "Report": self._method(pb.ReportRequest, self._report),
            "GetCheckpoint": self._method(pb.GetCheckpointRequest, self._checkpoint),
            "GetInclusion": self._method(pb.GetInclusionRequest, self._inclusion),
            "GetLeaves": self._method(pb.GetLeavesRequest, self._leaves),
            "Cosign": self._method(pb.CosignRequest, self._cosign),
        }

    def _method(self, kind: type[Request], answer: Callable[[Caller, Request], Message]) -> Handler:
        def handle(call: Call, request: Request) -> Message:
            return answer(known_caller(self._desk, self._limit, call), request)

        return self._door.method(kind, handle)

    def _server_card(self, caller: Caller, request: pb.GetServerCardRequest) -> pb.GetServerCardReply:
        del caller, request
        return pb.GetServerCardReply(server_card=self._desk.server_card())

    def _renew(self, caller: Caller, request: pb.RenewRequest) -> pb.RenewReply:
        if len(request.tls_csr_der) > LONGEST_CSR:
            raise TransportError(ErrorCode.CERTIFICATE_REQUEST, "the certificate request is too long", value=caller.site)
        made = self._desk.renew(caller, request.tls_csr_der)
        return pb.RenewReply(certificate_pem=made.certificate, ca_pem=made.authorities)

    def _rotate_key(self, caller: Caller, request: pb.RotateKeyRequest) -> pb.RotateKeyReply:
        self._desk.rotate_key(caller, site_card=request.site_card, rotation=request.rotation, continuity=request.continuity)
        return pb.RotateKeyReply()

    def _plans(self, caller: Caller, request: pb.ListPlansRequest) -> pb.ListPlansReply:
        del caller, request
        return pb.ListPlansReply(signed_plans=self._desk.plans())

    def _decide(self, caller: Caller, request: pb.DecideRequest) -> pb.DecideReply:
        self._desk.decide(caller, request.envelope)
        return pb.DecideReply()

    def _report(self, caller: Caller, request: pb.ReportRequest) -> pb.ReportReply:
        if request.state not in _STATES:
            raise TransportError(ErrorCode.REQUEST_REFUSED, f"a state is one of {_STATES}", value=repr(request.state[:20]))
        told = self._desk.report(caller, software=check_software(request.software), state=request.state)
        return pb.ReportReply(
            now=self._desk.now(),
            certificate_until=caller.certificate_until,
            log_size=self._log.checkpoint(0).size,
            renew=told.renew,
            outcomes=[_outcome(each) for each in told.outcomes],
            suspended=told.suspended,
        )

    def _checkpoint(self, caller: Caller, request: pb.GetCheckpointRequest) -> pb.GetCheckpointReply:
        del caller
        served = self._log.checkpoint(_size(request.known_size))
        return pb.GetCheckpointReply(note=served.note, consistency=served.consistency)

    def _inclusion(self, caller: Caller, request: pb.GetInclusionRequest) -> pb.GetInclusionReply:
        if len(request.leaf_hash) != _HASH_BYTES:
            raise TransportError(ErrorCode.REQUEST_REFUSED, f"a leaf hash has {_HASH_BYTES} bytes", value=caller.site)
        served = self._log.inclusion(request.leaf_hash, _size(request.size))
        return pb.GetInclusionReply(index=served.index, proof=served.proof)

    def _leaves(self, caller: Caller, request: pb.GetLeavesRequest) -> pb.GetLeavesReply:
        del caller
        return pb.GetLeavesReply(leaves=self._log.leaves(_size(request.start), _size(request.stop)))

    def _cosign(self, caller: Caller, request: pb.CosignRequest) -> pb.CosignReply:
        self._log.cosign(caller.site, _size(request.size), request.line)
        return pb.CosignReply()


def _outcome(found: Outcome) -> pb.Outcome:
    return pb.Outcome(run=found.run, round=found.round_index, state=found.state, code=found.code or "", offered_at=found.offered_at)


def known_caller(desk: ControlDesk, limit: RateLimit, call: Call) -> Caller:
    """Who makes a call.

    Raises:
        TransportError: PF415, nobody whose certificate stands; PF417, somebody who makes too many.
    """
    caller = desk.caller(presented(call.certificate, desk.consortium))
    if not limit.allows(caller.site):
        raise TransportError(ErrorCode.RATE_LIMITED, "too many calls from one site", value=caller.site)
    return caller


def _size(number: int) -> int:
    """A size or place in the log. A message can hold numbers that no database can."""
    if number > _LARGEST_LOG:
        raise TransportError(ErrorCode.REQUEST_REFUSED, f"a log has at most {_LARGEST_LOG} leaves", value=number)
    return number


def presented(certificate: bytes | None, consortium: str) -> Presented:
    """What a certificate says. TLS has checked that a trusted authority issued it and that the caller has its key.

    Raises:
        TransportError: PF415, there is none, or it does not name exactly one site of this consortium.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate or b"")
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        identity = spiffe.parse(uri)
    except (ValueError, x509.ExtensionNotFound):
        raise TransportError(ErrorCode.IDENTITY_REFUSED, "the certificate names no site") from None
    if identity.kind != "site" or identity.consortium != consortium or len(list(names)) != 1:
        raise TransportError(ErrorCode.IDENTITY_REFUSED, "the certificate is not that of a site of this consortium")
    return Presented(serial=serial_text(found), fingerprint=fingerprint(found), site=SiteName(identity.name))
