"""A control plane on loopback, of real gRPC and TLS, that is honest unless it is told to lie: for tests of the site's side.

The real server refuses to lie. This one lets a test exchange any reply (`lies`), show another log, or speak with other keys.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from google.protobuf import message_factory

from pathfed_common.ids import SiteName
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol import spiffe
from pathfed_common.protocol.invitation import Invitation, ca_pin
from pathfed_common.provenance import merkle
from pathfed_common.provenance.documents import ServerCard, SiteCard
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.log_checkpoint import Checkpoint, sign_checkpoint
from pathfed_common.provenance.merkle import MemoryNodeStore
from pathfed_server.transport.certificates import TlsFiles, make_tls

CONSORTIUM = "test"
ORIGIN = f"pathfed/{CONSORTIUM}"
#: A lie: (request, honest reply) -> reply. It may raise `Refused`.
Lie = Callable[[Any, Any], Any]


class Refused(Exception):  # noqa: N818 - what a test says
    """The server answers with a code."""

    def __init__(self, code: str, status: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION) -> None:
        super().__init__(code)
        self.code, self.status = code, status


@dataclass
class Log:
    """A transparency log in memory."""

    key: SigningKey
    leaves: list[bytes] = field(default_factory=list)

    def note(self, size: int | None = None) -> bytes:
        shown = self.leaves if size is None else self.leaves[:size]
        checkpoint = Checkpoint(origin=ORIGIN, size=len(shown), root=merkle.root_of(shown))
        return sign_checkpoint(checkpoint, self.key).to_bytes()

    def consistency(self, first: int) -> Sequence[bytes]:
        return merkle.consistency_proof(self._nodes(), first, len(self.leaves)) if 0 < first < len(self.leaves) else ()

    def inclusion(self, leaf: bytes, size: int) -> tuple[int, Sequence[bytes]]:
        index = [merkle.leaf_hash(one) for one in self.leaves].index(leaf)
        return index, merkle.inclusion_proof(self._nodes(), index, size)

    def _nodes(self) -> MemoryNodeStore:
        nodes = MemoryNodeStore()
        merkle.append(nodes, 0, [merkle.leaf_hash(leaf) for leaf in self.leaves])
        return nodes


@dataclass
class ControlServer:
    """One consortium's control plane. Ports are there once `running` has begun."""

    name: str = CONSORTIUM
    key: SigningKey = field(default_factory=SigningKey.generate)
    tls: TlsFiles = field(default_factory=lambda: make_tls(CONSORTIUM, ["127.0.0.1", "localhost"], now=datetime.datetime.now(datetime.UTC)))
    state: pb.EnrollReply.State = pb.EnrollReply.PENDING
    certificate_days: float = 30
    lies: dict[str, Lie] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    plans: list[bytes] = field(default_factory=list)
    words: list[bytes] = field(default_factory=list)
    cosigned: list[tuple[int, bytes]] = field(default_factory=list)
    serials: set[int] = field(default_factory=set)
    renew_wanted: bool = False
    told: dict[str, Any] = field(default_factory=dict)
    secrets: list[bytes] = field(default_factory=lambda: [bytes(range(32))], repr=False)
    cards: list[SiteCard] = field(default_factory=list)
    log: Log = field(init=False)
    enrolment_port: int = 0
    control_port: int = 0

    def __post_init__(self) -> None:
        self.log = Log(self.key)

    def card(self, **changes: Any) -> bytes:
        values: dict[str, Any] = {
            "name": self.name,
            "evidence_key": self.key.public,
            "ca_pem": self.tls.ca_certificate.decode(),
            "fleet_address": "127.0.0.1:1",
            "control_address": f"127.0.0.1:{self.control_port}",
            "enrolment_address": f"127.0.0.1:{self.enrolment_port}",
        }
        return ServerCard(**values | changes).to_bytes(self.key)

    def invitation(self, site: str, **changes: Any) -> str:
        values: dict[str, Any] = {
            "site": SiteName(site),
            "enrolment_address": f"127.0.0.1:{self.enrolment_port}",
            "secret": bytes(range(32)),
            "ca_pin": ca_pin(self.tls.ca_certificate),
            "server_key": self.key.public,
        }
        return Invitation(**values | changes).to_text()

    def certificate(self, csr: bytes, site: str, *, tls: TlsFiles | None = None, days: float | None = None) -> bytes:
        """A certificate for a request, by this server's authority or another."""
        authority = tls or self.tls
        ca = x509.load_pem_x509_certificate(authority.ca_certificate)
        now = datetime.datetime.now(datetime.UTC)
        uri = spiffe.site_uri(self.name, SiteName(site))
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)]))
            .issuer_name(ca.subject)
            .public_key(x509.load_der_x509_csr(csr).public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=self.certificate_days if days is None else days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .sign(load_pem_private_key(authority.ca_key, None), hashes.SHA256())  # type: ignore[arg-type]
        )
        self.serials.add(made.serial_number)
        return made.public_bytes(Encoding.PEM)

    @property
    def evidence_key(self) -> VerifyKey:
        """The site's key as the server knows it."""
        return self.cards[-1].evidence_key

    @contextlib.contextmanager
    def running(self, enrolment_port: int = 0, control_port: int = 0) -> Iterator["ControlServer"]:
        """Serve both ports; the same again after a stop where they are named."""
        chain = self.tls.certificate + self.tls.ca_certificate
        plain = grpc.ssl_server_credentials([(self.tls.key, chain)])
        mutual = grpc.ssl_server_credentials([(self.tls.key, chain)], root_certificates=self.tls.ca_certificate, require_client_auth=True)
        servers = []
        for service, credentials, port in (("Enrolment", plain, enrolment_port), ("Control", mutual, control_port)):
            server = grpc.server(ThreadPoolExecutor(4))
            server.add_generic_rpc_handlers((self._handlers(service),))
            bound = server.add_secure_port(f"127.0.0.1:{port}", credentials)
            setattr(self, f"{service.lower()}_port", bound)
            server.start()
            servers.append(server)
        try:
            yield self
        finally:
            for server in servers:
                server.stop(0).wait()

    def _handlers(self, service: str) -> grpc.GenericRpcHandler:
        descriptor = pb.DESCRIPTOR.services_by_name[service]
        methods = {method.name: self._handler(method.name, method.input_type) for method in descriptor.methods}
        return grpc.method_handlers_generic_handler(descriptor.full_name, methods)

    def _handler(self, name: str, request: Any) -> Any:
        def answer(message: Any, context: Any) -> Any:
            self.calls.append(name)
            self.requests.append(message)
            try:
                honest = getattr(self, f"_{name.lower()}")(message)
                return self.lies[name](message, honest) if name in self.lies else honest
            except Refused as refused:
                context.set_trailing_metadata((("pathfed-code", refused.code),))
                context.abort(refused.status, "refused")

        return grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=message_factory.GetMessageClass(request).FromString,
            response_serializer=lambda reply: reply.SerializeToString(),
        )

    def _enroll(self, request: Any) -> Any:
        if request.secret not in self.secrets:
            raise Refused("PF412")
        self.cards.append(SiteCard.from_bytes(request.site_card))
        if self.state != pb.EnrollReply.ADMITTED:
            return pb.EnrollReply(state=self.state)
        certificate = self.certificate(request.tls_csr_der, self.cards[-1].site)
        return pb.EnrollReply(state=self.state, certificate_pem=certificate, ca_pem=self.tls.ca_certificate, server_card=self.card())

    def _getservercard(self, request: Any) -> Any:
        return pb.GetServerCardReply(server_card=self.card())

    def _renew(self, request: Any) -> Any:
        certificate = self.certificate(request.tls_csr_der, self.cards[-1].site)
        return pb.RenewReply(certificate_pem=certificate, ca_pem=self.tls.ca_certificate)

    def _rotatekey(self, request: Any) -> Any:
        self.cards.append(SiteCard.from_bytes(request.site_card))
        if request.rotation:
            self.log.leaves.append(request.rotation)
        return pb.RotateKeyReply()

    def _listplans(self, request: Any) -> Any:
        return pb.ListPlansReply(signed_plans=self.plans)

    def _decide(self, request: Any) -> Any:
        self.words.append(request.envelope)
        return pb.DecideReply()

    def _report(self, request: Any) -> Any:
        now = datetime.datetime.now(datetime.UTC).timestamp()
        return pb.ReportReply(now=now, certificate_until=now + 1000, log_size=len(self.log.leaves), renew=self.renew_wanted, **self.told)

    def _getcheckpoint(self, request: Any) -> Any:
        if not self.log.leaves:
            return pb.GetCheckpointReply()
        return pb.GetCheckpointReply(note=self.log.note(), consistency=self.log.consistency(request.known_size))

    def _getinclusion(self, request: Any) -> Any:
        try:
            index, proof = self.log.inclusion(request.leaf_hash, request.size)
        except ValueError:
            raise Refused("PF610", grpc.StatusCode.NOT_FOUND) from None
        return pb.GetInclusionReply(index=index, proof=proof)

    def _getleaves(self, request: Any) -> Any:
        return pb.GetLeavesReply(leaves=self.log.leaves[request.start : request.stop])

    def _cosign(self, request: Any) -> Any:
        self.cosigned.append((request.size, request.line))
        return pb.CosignReply()
