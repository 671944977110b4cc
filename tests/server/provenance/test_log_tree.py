"""The tree in memory says at every size what the leaves say, and takes a page of leaves whole or not at all."""

import pytest
from tests.server.provenance.log_world import AT, plan_digest, statement

from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_leaves import AnyLeaf, PlanApproved, PlanPublished, SiteAdmitted, SiteRevoked, rotate_key
from pathfed_common.provenance.log_quorum import roll_of
from pathfed_common.provenance.merkle import EMPTY_ROOT, NodeId, root_of
from pathfed_common.units import UtcSeconds
from pathfed_server.provenance.log_tree import LogTree, _CompactNodes

A, B, C = (SiteName(name) for name in ("a", "b", "c"))
KEYS = [SigningKey.generate() for _ in range(5)]
NOW = UtcSeconds(AT)
LEAVES: list[AnyLeaf] = [
    PlanPublished(plan=plan_digest("p")),
    SiteAdmitted(site=A, evidence_key=KEYS[0].public, at=NOW),
    SiteAdmitted(site=B, evidence_key=KEYS[1].public, at=NOW),
    PlanApproved(site=A, plan=plan_digest("p"), approval=plan_digest("a")),
    rotate_key(A, KEYS[0], KEYS[2], NOW),
    statement(0),
    SiteRevoked(site=B, at=NOW),
    statement(1),
    SiteAdmitted(site=C, evidence_key=KEYS[3].public, at=NOW),
    SiteAdmitted(site=B, evidence_key=KEYS[4].public, at=NOW),
    statement(2),
]


@pytest.mark.parametrize("page", [1, 2, 3, 5, len(LEAVES)])
def test_roots_and_rolls_of_every_size_are_those_of_the_leaves(page: int) -> None:
    tree, data = LogTree(), [leaf.to_bytes() for leaf in LEAVES]
    assert tree.root(0) == EMPTY_ROOT
    for start in range(0, len(data), page):
        tree.append(data[start : start + page])
    assert tree.size == len(data)
    for size in range(len(data) + 1):
        assert tree.root(size) == root_of(data[:size])
        assert tree.roll(size) == roll_of(LEAVES[:size])


def test_page_with_a_leaf_that_cannot_follow_leaves_the_tree_as_it_was() -> None:
    tree, data = LogTree(), [leaf.to_bytes() for leaf in LEAVES]
    tree.append(data[:6])
    again = SiteAdmitted(site=C, evidence_key=KEYS[0].public, at=NOW).to_bytes()
    for _ in range(2):
        with pytest.raises(ProvenanceError) as caught:
            tree.append([data[6], data[7], again])
        assert caught.value.code is ErrorCode.RECORD_CHANGED
        assert (tree.size, tree.root(6), tree.roll(6)) == (6, root_of(data[:6]), roll_of(LEAVES[:6]))
    tree.append(data[6:])
    assert tree.roll(len(data)) == roll_of(LEAVES)


def test_nodes_that_are_not_there_or_come_out_of_order_are_refused() -> None:
    nodes = _CompactNodes()
    nodes.put({NodeId(0, 0): bytes(32), NodeId(0, 1): bytes(32), NodeId(1, 0): bytes(32)})
    for missing in (NodeId(0, 2), NodeId(2, 0), NodeId(5, 0)):
        with pytest.raises(KeyError):
            nodes.get([missing])
    for wrong in (NodeId(0, 1), NodeId(0, 3)):
        with pytest.raises(ValueError, match="in order"):
            nodes.put({wrong: bytes(32)})
