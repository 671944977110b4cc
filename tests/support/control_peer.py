"""A site as the control plane meets it: keys, requests, and a real gRPC client, with nothing of the site's own software."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import Message

from pathfed_common.digest import Digest
from pathfed_common.ids import SiteName
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol.enrolment import request_fingerprint
from pathfed_common.protocol.invitation import Invitation
from pathfed_common.provenance.documents import Approval, SiteCard
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.units import UtcSeconds
from pathfed_server.home import ServerHome

DEADLINE_S = 20.0
PEM = serialization.Encoding.PEM


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def csr_of(key: ec.EllipticCurvePrivateKey, name: x509.Name | None = None) -> bytes:
    return x509.CertificateSigningRequestBuilder(name or x509.Name([])).sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def openssh_of(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def new_node_key() -> str:
    return openssh_of(ec.generate_private_key(ec.SECP384R1()))


@dataclass(frozen=True)
class Peer:
    """One site's keys, and its certificate once it has one."""

    name: SiteName
    evidence: SigningKey = field(default_factory=SigningKey.generate)
    node_key: str = field(default_factory=new_node_key)
    tls: ec.EllipticCurvePrivateKey = field(default_factory=new_key)
    csr: bytes = b""
    certificate: bytes = b""
    authorities: bytes = b""

    @classmethod
    def make(cls, name: str) -> Self:
        made = cls(SiteName(name))
        return replace(made, csr=csr_of(made.tls))

    @property
    def card(self) -> bytes:
        return SiteCard(site=self.name, evidence_key=self.evidence.public, flower_key=self.node_key).to_bytes(self.evidence)

    @property
    def fingerprint(self) -> str:
        return request_fingerprint(self.card, self.csr)

    def request(self, invitation: str) -> pb.EnrollRequest:
        secret = Invitation.from_text(invitation).secret
        return pb.EnrollRequest(secret=secret, site_card=self.card, tls_csr_der=self.csr, software="0.1.0")

    def certified(self, reply: Any) -> "Peer":
        return replace(self, certificate=reply.certificate_pem, authorities=reply.ca_pem)

    def approval(self, plan: Digest, *, site: str | None = None) -> bytes:
        given = Approval(
            site=SiteName(site or self.name), plan=plan, declared_patients=8, reply_slots=True, approved_at=UtcSeconds(1_700_000_000.0)
        )
        return given.to_bytes(self.evidence)


def call(channel: grpc.Channel, service: str, method: str, request: Message | bytes, *, timeout: float | None = DEADLINE_S) -> Any:
    """One call, by the names in the proto file; bytes are sent as they are."""
    reply: Callable[[bytes], Message] = getattr(pb, f"{method}Reply").FromString
    send: Callable[..., Any] = channel.unary_unary(f"/pathfed.control.v1.{service}/{method}", response_deserializer=reply)
    return send(request if isinstance(request, bytes) else request.SerializeToString(), timeout=timeout)


@contextmanager
def enrolment_channel(home: ServerHome, authorities: bytes | None = None) -> Iterator[grpc.Channel]:
    """A connection to the enrolment port: no client certificate."""
    credentials = grpc.ssl_channel_credentials(authorities or home.ca_file.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{home.settings.enrolment_port}", credentials) as channel:
        yield channel


@contextmanager
def control_channel(home: ServerHome, peer: Peer | None, *, authorities: bytes | None = None) -> Iterator[grpc.Channel]:
    """A connection to the control port with a peer's certificate, or without one."""
    pair = (None, None) if peer is None else (pem_of(peer.tls), peer.certificate)
    credentials = grpc.ssl_channel_credentials(authorities or home.ca_file.read_bytes(), *pair)
    with grpc.secure_channel(f"127.0.0.1:{home.settings.control_port}", credentials) as channel:
        yield channel


def enroll(home: ServerHome, request: pb.EnrollRequest | bytes, **options: Any) -> Any:
    with enrolment_channel(home) as channel:
        return call(channel, "Enrolment", "Enroll", request, **options)


def control(home: ServerHome, peer: Peer | None, method: str, request: Message | bytes, **options: Any) -> Any:
    with control_channel(home, peer) as channel:
        return call(channel, "Control", method, request, **options)


def code_of(error: grpc.RpcError) -> str | None:
    """The stable code of a refused call."""
    found = [str(each.value) for each in error.trailing_metadata() or () if each.key == "pathfed-code"]
    return found[0] if found else None
