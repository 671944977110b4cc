"""One line of the egress record: something that left the site, as a value and as the bytes that the hash chain binds.

Two kinds of entries lie beside each other and must not be added up:

- **messages** say what left: one entry for each message or file, written before its first byte goes;
- **connections** say how many bytes went where: everything that a connection of the relay carried, messages and their wrapping alike.
  `connection-opened` is written before the first byte goes, `connection-sent` now and then, `connection-closed` at the end. Bytes and
  digest of each are those sent since the entry before it. A connection that was opened and never closed is open, or was cut by a crash:
  what it sent after its last entry is not known, and the sums say how many such there are.

Nothing here is a patient fact: sizes are constant for a plan, and the time of an answer is a public time slot.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.ids import run_name

_VERSION = 1


class EgressKind(StrEnum):
    """What left. A kind never changes its meaning."""

    #: The sealed update of a round: the noised sum. All of it, though what lies at the server already is not sent again.
    UPDATE = "update"
    #: Bytes of an update that were handed to the network before and are sent again, since the server does not have them.
    UPDATE_AGAIN = "update-again"
    #: What an update consists of: its length and the digests of its shards.
    UPDATE_MANIFEST = "update-manifest"
    #: The signed statement that goes with it.
    STATEMENT = "statement"
    #: A code in place of an answer to a round.
    REFUSAL = "refusal"
    #: A request to be enrolled: site card and certificate request.
    ENROLMENT = "enrolment"
    #: A request for a new certificate.
    RENEWAL = "renewal"
    #: A new key with its continuity.
    KEY_ROTATION = "key-rotation"
    #: The site's signed word on a plan.
    DECISION = "decision"
    #: State and software version.
    REPORT = "report"
    #: A cosignature of a log checkpoint.
    COSIGNATURE = "cosignature"
    #: A question whose content is public: plans, the server's card, checkpoints, proofs, leaves, base states and their shards.
    QUERY = "query"
    #: A connection is about to be opened.
    CONNECTION_OPENED = "connection-opened"
    #: What a connection sent since its entry before.
    CONNECTION_SENT = "connection-sent"
    #: What it sent since its entry before; it is closed.
    CONNECTION_CLOSED = "connection-closed"

    @property
    def is_connection(self) -> bool:
        """Whether it counts a connection's bytes, and is no message of its own."""
        return self in _OF_CONNECTIONS


_OF_CONNECTIONS = frozenset({EgressKind.CONNECTION_OPENED, EgressKind.CONNECTION_SENT, EgressKind.CONNECTION_CLOSED})


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """Something that is about to leave.

    Attributes:
        destination: HOST:PORT that it goes to.
        kind: what it is.
        size: bytes.
        digest: of these bytes.
        plan: digest of the plan it belongs to, or None.
        run: the run, or None.
        round_index: the round, or None.
        epsilon_charged: what the ledger charged for it, at the site's delta; 0 where the same bytes left before; None where it carries
            nothing that depends on patients.
        connection: the relay's name of the connection; None for a message.
        via: HOST:PORT of the web proxy on the way, or None.

    Raises:
        ValueError: a field is out of bounds.
    """

    destination: str
    kind: EgressKind
    size: int
    digest: Digest
    plan: Digest | None = None
    run: str | None = None
    round_index: int | None = None
    epsilon_charged: float | None = None
    connection: str | None = None
    via: str | None = None

    def __post_init__(self) -> None:
        if not self.destination.isprintable() or not self.destination:
            raise ValueError(f"destination must be HOST:PORT, got {self.destination!r}")
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 0:
            raise ValueError(f"size must be a whole number of bytes, got {self.size!r}")
        for text in (self.digest, self.plan):
            if text is not None:
                digest.parse(text)
        if self.run is not None:
            run_name(self.run)
        if self.epsilon_charged is not None and not 0 <= self.epsilon_charged < math.inf:
            raise ValueError(f"epsilon_charged must be finite and not negative, got {self.epsilon_charged!r}")
        if self.kind.is_connection != (self.connection is not None):
            raise ValueError(f"a connection's name goes with a connection's entry, got {self.kind} with {self.connection!r}")


@dataclass(frozen=True, kw_only=True)
class EgressEntry:
    """One stored line.

    Attributes:
        sequence: 1 for the first.
        previous: digest of the bytes of the entry before, None for the first.
        at: UTC seconds, before it left.
        sent: what left.
    """

    sequence: int
    previous: Digest | None
    at: float
    sent: Outgoing

    def to_bytes(self) -> bytes:
        """Canonical JSON; the time is also spelled out for people."""
        when = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds")
        return digest.canonical(
            {
                "version": _VERSION,
                "sequence": self.sequence,
                "previous": self.previous,
                "at": self.at,
                "at_text": when,
                **asdict(self.sent),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read an entry back.

        Raises:
            ValueError: not the canonical bytes of an entry of this version.
        """
        try:
            raw: dict[str, Any] = json.loads(data)
            values = {field.name: raw[field.name] for field in fields(Outgoing)}
            sent = Outgoing(**{**values, "kind": EgressKind(values["kind"])})
            entry = cls(sequence=raw["sequence"], previous=raw["previous"], at=raw["at"], sent=sent)
            canonical = entry.to_bytes()
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not an egress entry: {error}") from None
        if canonical != data:
            raise ValueError("not the canonical bytes of an egress entry")
        return entry

    def row(self) -> dict[str, Any]:
        """The entry as scripts and tables get it."""
        return {"sequence": self.sequence, "at": self.at, **asdict(self.sent), "kind": self.sent.kind.value}
