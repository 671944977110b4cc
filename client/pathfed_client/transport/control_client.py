"""The site's side of the control plane: one method for each call of `control.proto`, over TLS with certificates on both sides.

Replies are claims of the server. Whoever uses them checks plans and cards by signature, and the log by `provenance.log_witness`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

import grpc

from pathfed_client.egress.entry import EgressKind
from pathfed_client.egress.outlet import Outlet
from pathfed_client.transport.channel import Calls, Patience
from pathfed_common.ids import RunName, run_name
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.provenance.log_witness import PlacedProof
from pathfed_common.provenance.merkle import Proof

_STATES = ("offered", "admitted", "refused", "silent")
_MOST_OUTCOMES = 50
_SERVICE = pb.DESCRIPTOR.services_by_name["Control"].full_name


@dataclass(frozen=True)
class Issued:
    """A certificate and the CAs that it is to be trusted with, PEM."""

    certificate: bytes
    ca: bytes


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """What became of the site in one round, as the server says. `code`: why it does not count; empty: none. Times are UTC seconds."""

    run: RunName
    round_index: int
    state: str
    code: str
    offered_at: float


@dataclass(frozen=True)
class ServerReport:
    """What the server wants the site to know.

    Attributes:
        now: the server's clock, UTC seconds.
        certificate_until: end of the certificate that the site called with, UTC seconds.
        log_size: leaves in the log.
        renew: the site should renew its certificate now.
        suspended: the site is asked no more until an operator reinstates it.
        outcomes: what became of the site in the last rounds that it was asked in, the latest first.
    """

    now: float
    certificate_until: float
    log_size: int
    renew: bool
    suspended: bool = False
    outcomes: tuple[RoundOutcome, ...] = ()


def _outcomes(sent: Iterable[pb.Outcome]) -> Iterator[RoundOutcome]:
    """Those that can be one, and not more than a few: they are shown to people, and texts of a server are not to be trusted."""
    for each in islice(sent, _MOST_OUTCOMES):
        readable = each.state in _STATES and re.fullmatch(r"(PF[0-9]{3})?", each.code) and math.isfinite(each.offered_at)
        with suppress(ValueError):
            run = run_name(each.run)
            if readable:
                yield RoundOutcome(run=run, round_index=each.round, state=each.state, code=each.code, offered_at=each.offered_at)


class ControlClient:
    """Calls of one site. A context manager; methods raise as `Calls.call`."""

    def __init__(
        self,
        address: str,
        *,
        ca: bytes,
        certificate: bytes,
        key: bytes,
        outlet: Outlet,
        tunnel: int | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Prepare the channel.

        Args:
            address: HOST:PORT of the control port.
            ca: the CAs to trust, PEM.
            certificate: the site's certificate, PEM.
            key: its private key, PEM.
            outlet: writes down what leaves.
            tunnel: loopback port of the site's relay that leads there; None: no relay.
            patience: how lost calls are made again.

        Raises:
            TransportError: PF451, `https_proxy` is no proxy's address.
        """
        credentials = grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=certificate)
        self._calls = Calls(address, _SERVICE, credentials, outlet=outlet, tunnel=tunnel, patience=patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del kind, error, trace
        self.close()

    def close(self) -> None:
        """Close the channel. Safe to call twice."""
        self._calls.close()

    def server_card(self) -> bytes:
        """The server's signed card as it is now."""
        return self._calls.call("GetServerCard", pb.GetServerCardRequest(), pb.GetServerCardReply).server_card

    def renew(self, csr: bytes) -> Issued:
        """A certificate for a new TLS key."""
        reply = self._calls.call("Renew", pb.RenewRequest(tls_csr_der=csr), pb.RenewReply, EgressKind.RENEWAL)
        return Issued(reply.certificate_pem, reply.ca_pem)

    def rotate_key(self, site_card: bytes, *, rotation: bytes = b"", continuity: bytes = b"") -> None:
        """Hand over to a new evidence key (`rotation`) or a new Flower node key (`continuity`)."""
        request = pb.RotateKeyRequest(site_card=site_card, rotation=rotation, continuity=continuity)
        self._calls.call("RotateKey", request, pb.RotateKeyReply, EgressKind.KEY_ROTATION)

    def plans(self) -> Sequence[bytes]:
        """Every published plan, signed."""
        return tuple(self._calls.call("ListPlans", pb.ListPlansRequest(), pb.ListPlansReply).signed_plans)

    def decide(self, envelope: bytes) -> None:
        """Hand over the site's signed word on a plan."""
        self._calls.call("Decide", pb.DecideRequest(envelope=envelope), pb.DecideReply, EgressKind.DECISION)

    def report(self, *, software: str, state: str) -> ServerReport:
        """Say what the site is and does."""
        reply = self._calls.call("Report", pb.ReportRequest(software=software, state=state), pb.ReportReply, EgressKind.REPORT)
        return ServerReport(
            now=reply.now,
            certificate_until=reply.certificate_until,
            log_size=reply.log_size,
            renew=reply.renew,
            suspended=reply.suspended,
            outcomes=tuple(_outcomes(reply.outcomes)),
        )

    def checkpoint(self, known_size: int) -> tuple[bytes, Proof]:
        """The log's latest checkpoint (empty where the log is), and the proof that it continues the one of `known_size` leaves."""
        reply = self._calls.call("GetCheckpoint", pb.GetCheckpointRequest(known_size=known_size), pb.GetCheckpointReply)
        return reply.note, tuple(reply.consistency)

    def inclusion(self, leaf_hash: bytes, size: int) -> PlacedProof:
        """Where a leaf is in the log of `size` leaves, and the proof."""
        reply = self._calls.call("GetInclusion", pb.GetInclusionRequest(leaf_hash=leaf_hash, size=size), pb.GetInclusionReply)
        return PlacedProof(reply.index, tuple(reply.proof))

    def leaves(self, start: int, stop: int) -> Sequence[bytes]:
        """Leaves from `start` on, before `stop`; the server may give fewer."""
        return tuple(self._calls.call("GetLeaves", pb.GetLeavesRequest(start=start, stop=stop), pb.GetLeavesReply).leaves)

    def cosign(self, size: int, line: bytes) -> None:
        """Hand over the site's cosignature of the checkpoint of `size` leaves."""
        self._calls.call("Cosign", pb.CosignRequest(size=size, line=line), pb.CosignReply, EgressKind.COSIGNATURE)
