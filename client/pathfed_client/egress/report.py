"""Sums over the egress record, for those who answer for what left."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pathfed_client.egress.entry import EgressEntry, EgressKind


@dataclass
class EgressTotals:
    """What left, summed while entries go by; memory does not grow with their number.

    Attributes:
        sent: bytes that connections carried, by destination: what a capture at the firewall shows, less the framing of TLS, TCP and IP.
        messages: how many messages there were, by kind.
        sizes: their bytes, by kind. They are inside `sent`.
        epsilon_charged: by how much the updates that left raised the site's epsilon, at its delta.
        unclosed: connections that were opened and not closed yet, by name: open now, or cut by a crash.
    """

    sent: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    epsilon_charged: float = 0.0
    unclosed: set[str] = field(default_factory=set)

    def add(self, entry: EgressEntry) -> None:
        """Count an entry."""
        sent = entry.sent
        if sent.connection is None:
            self.messages[sent.kind.value] += 1
            self.sizes[sent.kind.value] += sent.size
            self.epsilon_charged += sent.epsilon_charged or 0.0
            return
        self.sent[sent.destination] += sent.size
        if sent.kind is EgressKind.CONNECTION_CLOSED:
            self.unclosed.discard(sent.connection)
        else:
            self.unclosed.add(sent.connection)

    def counting(self, entries: Iterable[EgressEntry]) -> Iterable[EgressEntry]:
        """The entries, counted as they go by."""
        for entry in entries:
            self.add(entry)
            yield entry

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "bytes_sent": dict(self.sent),
            "messages": {kind: {"messages": count, "bytes": self.sizes[kind]} for kind, count in sorted(self.messages.items())},
            "epsilon_charged": self.epsilon_charged,
            "connections_not_closed": len(self.unclosed),
        }
