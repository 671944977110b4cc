"""Merkle trees of RFC 9162 (section 2.1, the same as RFC 6962): roots, inclusion proofs and consistency proofs, made and verified. Pure.

A *complete node* is the root of a perfect subtree: node (level, position) covers the 2^level leaves from position * 2^level on. Its hash
never changes once its leaves are there, so a store only ever gains nodes, and every root and proof of every size, past or present, is made
from O(log n) of them. That is what the port `NodeStore` holds.

Leaves are hashed with a zero byte before them and nodes with a one byte, so that no leaf can be passed off as a node. Proofs are lists of
hashes, from the leaf's end of the tree to the root's. Verifying answers False for everything that does not hold, the malformed included;
making a proof that does not exist raises ValueError.

Source: https://www.rfc-editor.org/rfc/rfc9162.html#section-2.1.
"""

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

HASH_BYTES = 32
#: The hash of no leaves at all.
EMPTY_ROOT = hashlib.sha256(b"").digest()

Proof = tuple[bytes, ...]
#: Leaves begin to end - 1.
_Range = tuple[int, int]


class NodeId(NamedTuple):
    """A complete node: it covers leaves ``position * 2**level`` to ``(position + 1) * 2**level - 1``."""

    level: int
    position: int


class NodeStore(Protocol):
    """Where complete nodes are kept. Nodes are added and never changed."""

    def get(self, nodes: Sequence[NodeId]) -> Sequence[bytes]:
        """Hashes of these nodes, in this order; every one of them was put before.

        Raises:
            KeyError: a node is missing.
        """
        ...

    def put(self, nodes: Mapping[NodeId, bytes]) -> None:
        """Keep these nodes, all of them or none.

        Raises:
            ValueError: a node is kept already with another hash.
        """
        ...


class MemoryNodeStore:
    """Nodes in memory, for verifiers and tests."""

    def __init__(self) -> None:
        """Start empty."""
        self._hashes: dict[NodeId, bytes] = {}

    def get(self, nodes: Sequence[NodeId]) -> Sequence[bytes]:
        """See `NodeStore.get`."""
        return [self._hashes[node] for node in nodes]

    def put(self, nodes: Mapping[NodeId, bytes]) -> None:
        """See `NodeStore.put`."""
        changed = [node for node, value in nodes.items() if self._hashes.get(node, value) != value]
        if changed:
            raise ValueError(f"a complete node never changes, but {changed[0]} would")
        self._hashes.update(nodes)


class Frontier:
    """The right edge of a growing tree: all that is needed to append a leaf and to know the root, at most log2(n) + 1 hashes."""

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        """Start from a tree of `size` leaves, given the hashes of `frontier_nodes(size)`.

        Raises:
            ValueError: another number of hashes.
        """
        nodes = frontier_nodes(size)
        if len(nodes) != len(hashes):
            raise ValueError(f"a tree of {size} leaves has {len(nodes)} frontier nodes, got {len(hashes)}")
        self.size = size
        self._edge = [(node.level, _whole_hash(value)) for node, value in zip(nodes, hashes, strict=True)]

    def append(self, leaf: bytes) -> list[tuple[NodeId, bytes]]:
        """Take one more leaf, given its leaf hash; returns the nodes that became complete with it, the leaf's own first."""
        level, value, index = 0, _whole_hash(leaf), self.size
        completed = [(NodeId(0, index), value)]
        while self._edge and self._edge[-1][0] == level:
            value = node_hash(self._edge.pop()[1], value)
            level, index = level + 1, index >> 1
            completed.append((NodeId(level, index), value))
        self._edge.append((level, value))
        self.size += 1
        return completed

    def root(self) -> bytes:
        """The root of the leaves so far."""
        return _folded([value for _, value in self._edge])

    @property
    def edge(self) -> tuple[bytes, ...]:
        """The hashes of `frontier_nodes(size)`: what a tree of this size goes on from."""
        return tuple(value for _, value in self._edge)


def leaf_hash(leaf: bytes) -> bytes:
    """Hash of a leaf's bytes: SHA-256 of a zero byte and the leaf."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of a node: SHA-256 of a one byte and the hashes of its two children."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(leaves: Iterable[bytes]) -> bytes:
    """The root over these leaves' bytes, in O(log n) memory."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf_hash(leaf))
    return frontier.root()


def frontier_nodes(size: int) -> list[NodeId]:
    """The complete nodes that a tree of `size` leaves is made of, from left to right.

    Raises:
        ValueError: `size` is below 0.
    """
    if size < 0:
        raise ValueError(f"a tree has at least 0 leaves, got {size}")
    return _cover((0, size))


def append(store: NodeStore, size: int, leaves: Sequence[bytes]) -> bytes:
    """Add leaves, given as leaf hashes, to the stored tree of `size` leaves. One read, one write.

    Returns:
        The root of the `size + len(leaves)` leaves.

    Raises:
        ValueError: the store already has other leaves there.
    """
    frontier = Frontier(size, store.get(frontier_nodes(size)))
    completed: dict[NodeId, bytes] = {}
    for leaf in leaves:
        completed.update(frontier.append(leaf))
    store.put(completed)
    return frontier.root()


def root(store: NodeStore, size: int) -> bytes:
    """The root of the first `size` stored leaves."""
    return _folded(store.get(frontier_nodes(size)))


def inclusion_proof(store: NodeStore, index: int, size: int) -> Proof:
    """Proof that leaf `index` is in the tree of the first `size` leaves (RFC 9162, 2.1.3.1). One read of the store.

    Raises:
        ValueError: not 0 <= index < size.
    """
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is not in a tree of {size} leaves")
    begin, end = 0, size
    ranges: list[_Range] = []
    while end - begin > 1:
        middle = begin + _left_leaves(end - begin)
        if index < middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((begin, middle))
            begin = middle
    return _hashes(store, ranges[::-1])


def consistency_proof(store: NodeStore, first: int, second: int) -> Proof:
    """Proof that the tree of `second` leaves begins with the tree of `first` leaves (RFC 9162, 2.1.4.1). One read of the store.

    Raises:
        ValueError: not 0 < first <= second.
    """
    if not 0 < first <= second:
        raise ValueError(f"a consistency proof goes from at least 1 leaf to as many or more, got {first} to {second}")
    begin, end = 0, second
    ranges: list[_Range] = []
    while first != end:
        middle = begin + _left_leaves(end - begin)
        if first <= middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((begin, middle))
            begin = middle
    # Where the walk never turned right, what is left is the first tree itself, whose root the verifier has.
    if begin > 0:
        ranges.append((begin, end))
    return _hashes(store, ranges[::-1])


def verify_inclusion(*, leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether the proof shows that a leaf is in a tree (RFC 9162, 2.1.3.2).

    Args:
        leaf: the leaf hash.
        index: the leaf's place, from 0.
        size: leaves in the tree.
        proof: the hashes.
        root: the tree's root.
    """
    if not 0 <= index < size or not _well_formed(leaf, root, *proof):
        return False
    place, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            found = node_hash(sibling, found)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and hmac.compare_digest(found, root)


def verify_consistency(*, first: int, first_root: bytes, second: int, second_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the proof shows that the tree of `second` leaves begins with the tree of `first` leaves (RFC 9162, 2.1.4.2).

    | case | answer |
    | --- | --- |
    | first is 0, or above second | False |
    | first equals second | whether the roots are equal and the proof is empty |
    """
    if not 0 < first <= second or not _well_formed(first_root, second_root, *proof):
        return False
    if first == second:
        return not proof and hmac.compare_digest(first_root, second_root)
    if not proof:
        return False
    path = [first_root, *proof] if first & (first - 1) == 0 else list(proof)
    place, last = first - 1, second - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and hmac.compare_digest(old, first_root) and hmac.compare_digest(new, second_root)


def _left_leaves(size: int) -> int:
    """Leaves of the left half: the largest power of two below `size`, which is at least 2."""
    return 1 << (size - 1).bit_length() - 1


def _cover(leaves: _Range) -> list[NodeId]:
    """The complete nodes that a subtree of an RFC 9162 tree is made of, left to right; such subtrees begin where their largest node may."""
    begin, end = leaves
    size, nodes = end - begin, []
    for level in reversed(range(size.bit_length())):
        if size >> level & 1:
            nodes.append(NodeId(level, begin >> level))
            begin += 1 << level
    return nodes


def _hashes(store: NodeStore, ranges: Sequence[_Range]) -> Proof:
    covers = [_cover(leaves) for leaves in ranges]
    hashes = iter(store.get([node for cover in covers for node in cover]))
    return tuple(_folded([next(hashes) for _ in cover]) for cover in covers)


def _folded(hashes: Sequence[bytes]) -> bytes:
    """The root over complete nodes, given left to right."""
    if not hashes:
        return EMPTY_ROOT
    found = hashes[-1]
    for value in reversed(hashes[:-1]):
        found = node_hash(value, found)
    return found


def _whole_hash(value: bytes) -> bytes:
    if len(value) != HASH_BYTES:
        raise ValueError(f"a hash has {HASH_BYTES} bytes, got {len(value)}")
    return value


def _well_formed(*hashes: bytes) -> bool:
    # Without this, bytes could be moved from one hash to its neighbour and hash the same.
    return all(len(value) == HASH_BYTES for value in hashes)
