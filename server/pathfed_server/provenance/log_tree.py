"""The log's tree in memory: its leaves' hashes and all complete nodes, 64 bytes a leaf, and who was enrolled at every size. Pure.

It is made from the leaves each time a process starts (0.2 seconds for 50,000) and from then on takes new leaves alone, so that roots and
proofs cost O(log n). Nothing of it is stored: a leaf that was changed in the database gives another root than the one that was signed.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pathfed_common.provenance import merkle
from pathfed_common.provenance.log_leaves import KeyRotated, SiteAdmitted, SiteRevoked, read_leaf
from pathfed_common.provenance.log_quorum import Roll
from pathfed_common.provenance.merkle import HASH_BYTES, NodeId, Proof

#: The kinds of leaves that change who is enrolled, or with which key.
MEMBERSHIP = (SiteAdmitted.kind, SiteRevoked.kind, KeyRotated.kind)
# Canonical JSON spells a leaf's kind in this one way; no other field of a leaf can hold quotes.
_MARKS = tuple(f'"kind":"{kind}"'.encode() for kind in MEMBERSHIP)


class LogTree:
    """A tree that leaves are added to. Not for several threads at once."""

    def __init__(self) -> None:
        """Start empty."""
        self.size = 0
        self._nodes = _CompactNodes()
        self._sizes, self._rolls = [0], [Roll()]

    def append(self, leaves: Sequence[bytes]) -> None:
        """Take further leaves, given as their bytes: all of them, or none where one is refused.

        Raises:
            ProvenanceError: PF601, PF602: an admission, revocation or rotation that cannot follow.
        """
        rolls = self._rolls[-1:]
        for index, leaf in enumerate(leaves, start=self.size):
            if any(mark in leaf for mark in _MARKS):
                rolls.append(replace(rolls[-1], size=index).after(read_leaf(leaf, where=f"log, leaf {index}")))
        self._rolls += rolls[1:]
        self._sizes += [roll.size for roll in rolls[1:]]
        merkle.append(self._nodes, self.size, [merkle.leaf_hash(leaf) for leaf in leaves])
        self.size += len(leaves)

    def root(self, size: int) -> bytes:
        """The root of the first `size` leaves."""
        return merkle.root(self._nodes, size)

    def inclusion(self, index: int, size: int) -> Proof:
        """Proof that leaf `index` is among the first `size`."""
        return merkle.inclusion_proof(self._nodes, index, size)

    def consistency(self, first: int, second: int) -> Proof:
        """Proof that the first `second` leaves begin with the first `first`."""
        return merkle.consistency_proof(self._nodes, first, second)

    def roll(self, size: int) -> Roll:
        """Who is and was enrolled after the first `size` leaves."""
        return replace(self._rolls[bisect_right(self._sizes, size) - 1], size=size)


class _CompactNodes:
    """Implements `merkle.NodeStore` in a byte array for each level; nodes of a level come in order."""

    def __init__(self) -> None:
        self._levels: list[bytearray] = []

    def get(self, nodes: Sequence[NodeId]) -> Sequence[bytes]:
        """See `merkle.NodeStore.get`."""
        return [self._hash(node) for node in nodes]

    def put(self, nodes: Mapping[NodeId, bytes]) -> None:
        """See `merkle.NodeStore.put`."""
        for node, value in nodes.items():
            if node.level == len(self._levels):
                self._levels.append(bytearray())
            if len(self._levels[node.level]) != node.position * HASH_BYTES:
                raise ValueError(f"nodes of a level come in order, but not {node}")
            self._levels[node.level] += value

    def _hash(self, node: NodeId) -> bytes:
        start = node.position * HASH_BYTES
        if node.level >= len(self._levels) or start + HASH_BYTES > len(self._levels[node.level]):
            raise KeyError(node)
        return bytes(self._levels[node.level][start : start + HASH_BYTES])
