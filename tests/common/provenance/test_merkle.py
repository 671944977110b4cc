"""Merkle trees: RFC vectors, an independent implementation's answers, the definition by recursion, and proofs that must not pass."""

import hashlib
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common.provenance import merkle
from pathfed_common.provenance.merkle import EMPTY_ROOT, Frontier, MemoryNodeStore, NodeId

# The inputs and hashes that Certificate Transparency's implementations share: RFC 6962 trees over eight leaves.
# https://github.com/transparency-dev/merkle/blob/417fb0c314750d94e53942e9f92e79b6d35915db/testonly/constants.go
_CT_LEAVES = [
    bytes.fromhex(text) for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
_CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
_CT_NODES = {
    (0, 0): "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    (0, 1): "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    (0, 2): "0298d122906dcfc10892cb53a73992fc5b9f493ea4c9badb27b791b4127a7fe7",
    (0, 3): "07506a85fd9dd2f120eb694f86011e5bb4662e5c415a62917033d4a9624487e7",
    (0, 4): "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    (0, 5): "4271a26be0d8a84f0bd54c8c302e7cb3a3b5d1fa6780a40bcce2873477dab658",
    (0, 6): "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f",
    (0, 7): "46f6ffadd3d06a09ff3c5860d2755c8b9819db7df44251788c7d8e3180de8eb1",
    (1, 0): "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    (1, 1): "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    (1, 2): "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
    (1, 3): "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    (2, 0): "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    (2, 1): "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    (3, 0): "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}
_Node = tuple[int, int] | str
# Proofs over these leaves: (index, size) and the nodes that make the proof. RFC 6962, section 2.1.3, draws the tree of seven leaves and
# names its proofs; here with that tree's letters (a-g leaf hashes, h-k their parents and so on) as nodes of the table above.
_CT_INCLUSION: dict[tuple[int, int], list[_Node]] = {
    (0, 1): [],
    (0, 8): [(0, 1), (1, 1), (2, 1)],
    (5, 8): [(0, 4), (1, 3), (2, 0)],
    (2, 3): [(1, 0)],
    (1, 5): [(0, 0), (1, 1), (0, 4)],
    (0, 7): [(0, 1), (1, 1), "l"],
    (3, 7): [(0, 2), (1, 0), "l"],
    (4, 7): [(0, 5), (0, 6), (2, 0)],
    (6, 7): [(1, 2), (2, 0)],
}
_CT_CONSISTENCY: dict[tuple[int, int], list[_Node]] = {
    (1, 1): [],
    (1, 8): [(0, 1), (1, 1), (2, 1)],
    (6, 8): [(1, 2), (1, 3), (2, 0)],
    (2, 5): [(1, 1), (0, 4)],
    (6, 7): [(1, 2), (0, 6), (2, 0)],
    (3, 7): [(0, 2), (0, 3), (1, 0), "l"],
    (4, 7): ["l"],
}
#: l, the right half of RFC 6962's tree of seven leaves: the one node of these proofs that is not complete.
_RIGHT_OF_SEVEN = hashlib.sha256(b"\x01" + bytes.fromhex(_CT_NODES[1, 2]) + bytes.fromhex(_CT_NODES[0, 6])).digest()

# Over leaves b"leaf 0", b"leaf 1", ..., computed with pymerkle 7.0.0 (GPL, run once elsewhere, not used here): roots; and SHA-256 over, for
# each size from 1 to 64, the root and all inclusion proofs by index; and over all inclusion proofs of size 1000.
_PYMERKLE_ROOTS = {
    1: "1bb97dcc21635d47e2663efdfd0a174686d98dd701352dd2cd06e8b43fd3d305",
    2: "fc5f6b88ff8554f75bb2f9e6f39c31b1936d44b69276edf7b1205a955b9761e3",
    3: "d4f92c8fbb89720eb3b55677c7d7efaddfeb10d11a1a84a0ba8f1a23337faa95",
    7: "5a61fc2b54f9cfa71774f2432143dd40c6cb2b11947faf65a7d3da5cb65199c8",
    100: "13f88915c560dc911a1da0fb209d84a20971051f294ebeb428fb3fc293af2743",
    777: "704a21db8a2281d7f637c0b3dde772330b64d8f77c340578304fd82eb945fc29",
    1000: "2ff33fb9d8f14f89ca306289633336a168ff3f4532e8f741a0019dcb4c1d60a1",
}
_PYMERKLE_TO_64 = "89a443cc0eeb6a6adf43d6005556226b80277a684d0a3757973da62ea449e05f"
_PYMERKLE_OF_1000 = "73e9ac928796dc196d8cf688084f71a60f1a9ab1bb5456d022ecde4955d1dd53"


def _store(leaves: list[bytes]) -> MemoryNodeStore:
    store = MemoryNodeStore()
    merkle.append(store, 0, [merkle.leaf_hash(leaf) for leaf in leaves])
    return store


def _ct_hashes(nodes: list[_Node]) -> tuple[bytes, ...]:
    return tuple(_RIGHT_OF_SEVEN if isinstance(node, str) else bytes.fromhex(_CT_NODES[node]) for node in nodes)


@pytest.fixture(scope="module")
def thousand() -> MemoryNodeStore:
    return _store([b"leaf %d" % index for index in range(1000)])


# The definitions of RFC 9162, section 2.1, word for word and by brute force: nothing is shared with the code under test.


def _mth(leaves: list[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = _split(len(leaves))
    return hashlib.sha256(b"\x01" + _mth(leaves[:k]) + _mth(leaves[k:])).digest()


def _path(m: int, leaves: list[bytes]) -> list[bytes]:
    if len(leaves) == 1:
        return []
    k = _split(len(leaves))
    return [*_path(m, leaves[:k]), _mth(leaves[k:])] if m < k else [*_path(m - k, leaves[k:]), _mth(leaves[:k])]


def _subproof(m: int, leaves: list[bytes], known: bool) -> list[bytes]:
    if m == len(leaves):
        return [] if known else [_mth(leaves)]
    k = _split(len(leaves))
    if m <= k:
        return [*_subproof(m, leaves[:k], known), _mth(leaves[k:])]
    return [*_subproof(m - k, leaves[k:], False), _mth(leaves[:k])]


def _split(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


def test_roots_are_the_ct_vectors() -> None:
    store = _store(_CT_LEAVES)
    for size, expected in enumerate(_CT_ROOTS):
        assert merkle.root(store, size).hex() == expected
        assert merkle.root_of(_CT_LEAVES[:size]).hex() == expected
    assert EMPTY_ROOT.hex() == _CT_ROOTS[0]
    assert {node: store.get([NodeId(*node)])[0].hex() for node in _CT_NODES} == _CT_NODES


def test_proofs_are_the_ct_vectors() -> None:
    store = _store(_CT_LEAVES)
    for (index, size), nodes in _CT_INCLUSION.items():
        assert merkle.inclusion_proof(store, index, size) == _ct_hashes(nodes)
        assert merkle.verify_inclusion(
            leaf=bytes.fromhex(_CT_NODES[0, index]), index=index, size=size, proof=_ct_hashes(nodes), root=bytes.fromhex(_CT_ROOTS[size])
        )
    for (first, second), nodes in _CT_CONSISTENCY.items():
        assert merkle.consistency_proof(store, first, second) == _ct_hashes(nodes)
        roots = [bytes.fromhex(_CT_ROOTS[size]) for size in (first, second)]
        proof = _ct_hashes(nodes)
        assert merkle.verify_consistency(first=first, first_root=roots[0], second=second, second_root=roots[1], proof=proof)


def test_another_implementation_gives_the_same_roots_and_proofs(thousand: MemoryNodeStore) -> None:
    for size, expected in _PYMERKLE_ROOTS.items():
        assert merkle.root(thousand, size).hex() == expected
    seen = hashlib.sha256()
    for size in range(1, 65):
        seen.update(merkle.root(thousand, size))
        seen.update(b"".join(b"".join(merkle.inclusion_proof(thousand, index, size)) for index in range(size)))
    assert seen.hexdigest() == _PYMERKLE_TO_64
    proofs = b"".join(b"".join(merkle.inclusion_proof(thousand, index, 1000)) for index in range(1000))
    assert hashlib.sha256(proofs).hexdigest() == _PYMERKLE_OF_1000


@given(leaves=st.lists(st.binary(max_size=3), max_size=40), data=st.data())
def test_roots_and_proofs_are_those_of_the_definition(leaves: list[bytes], data: st.DataObject) -> None:
    store = _store(leaves)
    size = data.draw(st.integers(0, len(leaves)))
    assert merkle.root(store, size) == _mth(leaves[:size]) == merkle.root_of(leaves[:size])
    if size:
        index, first = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
        assert list(merkle.inclusion_proof(store, index, size)) == _path(index, leaves[:size])
        assert list(merkle.consistency_proof(store, first, size)) == _subproof(first, leaves[:size], True)


def test_every_honest_proof_of_small_trees_verifies() -> None:
    leaves = [bytes([number]) for number in range(34)]
    store, roots = _store(leaves), [_mth(leaves[:size]) for size in range(35)]
    for size in range(1, 35):
        for index in range(size):
            proof = merkle.inclusion_proof(store, index, size)
            assert merkle.verify_inclusion(leaf=merkle.leaf_hash(leaves[index]), index=index, size=size, proof=proof, root=roots[size])
        for first in range(1, size + 1):
            proof = merkle.consistency_proof(store, first, size)
            assert merkle.verify_consistency(first=first, first_root=roots[first], second=size, second_root=roots[size], proof=proof)


def test_a_proof_fits_no_other_place_size_leaf_or_root() -> None:
    leaves = [bytes([number]) for number in range(17)]
    store, roots = _store(leaves), [_mth(leaves[:size]) for size in range(18)]
    for size in (1, 2, 5, 8, 13, 16):
        for index in range(size):
            proof = merkle.inclusion_proof(store, index, size)
            for other_size, root in enumerate(roots):
                # The pair of size and root is what a checkpoint signs. (A path may have the same turns at another size, so a root under a
                # wrong size proves nothing: that is why a size never comes from whoever brings the proof.)
                for other in range(-1, 18):
                    leaf = merkle.leaf_hash(leaves[index])
                    passes = merkle.verify_inclusion(leaf=leaf, index=other, size=other_size, proof=proof, root=root)
                    assert passes == ((other, other_size) == (index, size))


_FAKE = merkle.leaf_hash(b"fake")


def _damaged(data: st.DataObject, proof: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The proof with one thing wrong."""
    hashes = list(proof)
    places = st.integers(0, max(0, len(hashes) - 1))
    damage = data.draw(st.sampled_from(["insert", "append", *(["drop", "flip", "cut", "grow", "swap", "join"] if hashes else [])]))
    place = data.draw(places)
    match damage:
        case "insert":
            hashes.insert(place, data.draw(st.sampled_from([_FAKE, b"", *hashes])))
        case "append":
            hashes.append(data.draw(st.sampled_from([_FAKE, b"", *hashes])))
        case "drop":
            del hashes[place]
        case "flip":
            bit = data.draw(st.integers(0, 255))
            hashes[place] = (int.from_bytes(hashes[place], "big") ^ 1 << bit).to_bytes(32, "big")
        case "cut":
            hashes[place] = hashes[place][:-1]
        case "grow":
            hashes[place] += b"\x00"
        case "swap":
            hashes.reverse()
        case "join" if place + 1 < len(hashes):
            # The same bytes in all, at another border.
            hashes[place], hashes[place + 1] = hashes[place] + hashes[place + 1][:1], hashes[place + 1][1:]
    return tuple(hashes)


@given(size=st.integers(1, 300), data=st.data())
def test_damaged_inclusion_proofs_are_refused(thousand: MemoryNodeStore, size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    leaf, root = merkle.leaf_hash(b"leaf %d" % index), merkle.root(thousand, size)
    honest = merkle.inclusion_proof(thousand, index, size)
    proof = _damaged(data, honest)
    assert merkle.verify_inclusion(leaf=leaf, index=index, size=size, proof=proof, root=root) == (proof == honest)
    assert not merkle.verify_inclusion(leaf=_FAKE, index=index, size=size, proof=honest, root=root)
    assert not merkle.verify_inclusion(leaf=leaf, index=index, size=size, proof=honest, root=_FAKE)


@given(second=st.integers(1, 300), data=st.data())
def test_damaged_consistency_proofs_are_refused(thousand: MemoryNodeStore, second: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, second))
    old, new = merkle.root(thousand, first), merkle.root(thousand, second)
    honest = merkle.consistency_proof(thousand, first, second)

    def passes(proof: tuple[bytes, ...], **change: object) -> bool:
        given_: dict[str, object] = {"first": first, "first_root": old, "second": second, "second_root": new, "proof": proof}
        return merkle.verify_consistency(**{**given_, **change})  # type: ignore[arg-type]

    proof = _damaged(data, honest)
    assert passes(proof) == (proof == honest)
    assert not passes(honest, first_root=_FAKE)
    assert not passes(honest, second_root=_FAKE)
    if first != second:
        assert not passes(honest, first=second, first_root=new, second=first, second_root=old)
        assert not passes(honest, first=first + 1)
    assert not passes(honest, first=0)
    assert not passes(honest, first=0, first_root=EMPTY_ROOT)
    assert not passes((), first=0, first_root=EMPTY_ROOT)


def test_a_rewritten_history_has_no_consistency_proof() -> None:
    """Planted fault: one early leaf changed. No proof made from either tree passes."""
    leaves = [bytes([number]) for number in range(20)]
    forged = [*leaves[:4], b"other", *leaves[5:]]
    honest, other = _store(leaves), _store(forged)
    for first in range(5, 21):
        for second in range(first, 21):
            for store in (honest, other):
                assert not merkle.verify_consistency(
                    first=first,
                    first_root=merkle.root(honest, first),
                    second=second,
                    second_root=merkle.root(other, second),
                    proof=merkle.consistency_proof(store, first, second),
                )


def test_hashes_of_other_lengths_are_refused_though_the_bytes_add_up() -> None:
    left, right = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    root = merkle.node_hash(left, right)
    assert merkle.verify_inclusion(leaf=left, index=0, size=2, proof=(right,), root=root)
    assert merkle.node_hash(left[:-1], left[-1:] + right) == root
    assert not merkle.verify_inclusion(leaf=left[:-1], index=0, size=2, proof=(left[-1:] + right,), root=root)
    assert not merkle.verify_consistency(first=1, first_root=left[:-1], second=2, second_root=root, proof=(left[-1:] + right,))


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 3), (3, 3), (4, 3), (0, -1)])
def test_inclusion_proofs_of_leaves_that_are_not_there_are_not_made(thousand: MemoryNodeStore, index: int, size: int) -> None:
    with pytest.raises(ValueError, match="not in a tree"):
        merkle.inclusion_proof(thousand, index, size)
    assert not merkle.verify_inclusion(leaf=_FAKE, index=index, size=size, proof=(), root=_FAKE)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 3), (4, 3), (-1, 3)])
def test_consistency_proofs_from_nothing_or_backwards_are_not_made(thousand: MemoryNodeStore, first: int, second: int) -> None:
    with pytest.raises(ValueError, match="at least 1 leaf"):
        merkle.consistency_proof(thousand, first, second)


def test_a_leaf_is_never_taken_for_a_node() -> None:
    """Without domain separation a leaf that spells two hashes would be their parent."""
    left, right = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    root = merkle.root_of([b"a", b"b"])
    assert merkle.leaf_hash(left + right) != root
    assert not merkle.verify_inclusion(leaf=merkle.leaf_hash(left + right), index=0, size=1, proof=(), root=root)


@given(steps=st.lists(st.integers(0, 9), max_size=12))
def test_appending_in_any_steps_gives_the_same_tree(thousand: MemoryNodeStore, steps: list[int]) -> None:
    store, size = MemoryNodeStore(), 0
    hashes = [merkle.leaf_hash(b"leaf %d" % index) for index in range(200)]
    for step in steps:
        root = merkle.append(store, size, hashes[size : size + step])
        size += step
        assert root == merkle.root(thousand, size) == merkle.root(store, size)
    assert store.get(merkle.frontier_nodes(size)) == thousand.get(merkle.frontier_nodes(size))


class _Counting(MemoryNodeStore):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def get(self, nodes: Sequence[NodeId]) -> Sequence[bytes]:
        self.calls.append(len(nodes))
        return super().get(nodes)

    def put(self, nodes: Mapping[NodeId, bytes]) -> None:
        self.calls.append(len(nodes))
        super().put(nodes)


def test_appending_and_proving_touch_a_logarithm_of_the_nodes() -> None:
    store, size = _Counting(), 4000
    merkle.append(store, 0, [merkle.leaf_hash(b"%d" % index) for index in range(size)])
    store.calls.clear()
    merkle.append(store, size, [_FAKE])
    assert len(store.calls) == 2
    assert sum(store.calls) <= 2 * 13
    for make in (
        lambda: merkle.root(store, 3999),
        lambda: merkle.inclusion_proof(store, 1234, 3999),
        lambda: merkle.consistency_proof(store, 2047, 3999),
    ):
        store.calls.clear()
        make()
        assert len(store.calls) == 1
        assert store.calls[0] <= 2 * 12


def test_a_stored_node_never_changes_and_nothing_is_kept_of_a_failed_append() -> None:
    store = _store([b"a", b"b", b"c"])
    with pytest.raises(ValueError, match="never changes"):
        merkle.append(store, 2, [merkle.leaf_hash(b"other"), merkle.leaf_hash(b"d")])
    with pytest.raises(KeyError):
        store.get([NodeId(0, 3)])
    assert merkle.root(store, 3) == _mth([b"a", b"b", b"c"])
    assert merkle.append(store, 2, [merkle.leaf_hash(b"c")]) == _mth([b"a", b"b", b"c"])


def test_a_frontier_goes_on_from_its_nodes(thousand: MemoryNodeStore) -> None:
    frontier = Frontier(777, thousand.get(merkle.frontier_nodes(777)))
    assert frontier.root() == merkle.root(thousand, 777)
    for index in range(777, 1000):
        frontier.append(merkle.leaf_hash(b"leaf %d" % index))
    assert frontier.root() == merkle.root(thousand, 1000)
    with pytest.raises(ValueError, match="frontier nodes"):
        Frontier(3, [_FAKE])
    with pytest.raises(ValueError, match="32 bytes"):
        Frontier().append(b"short")
    with pytest.raises(ValueError, match="at least 0"):
        Frontier(-1)
