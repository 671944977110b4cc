"""Sites that judge and cosign, an operator that forks and rewrites, and a verifier with bytes and a key. Real signatures."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import pytest

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import merkle
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import Checkpoint, cosign_checkpoint, log_key, sign_checkpoint
from pathfed_common.provenance.log_history import History, read_history
from pathfed_common.provenance.log_leaves import AnyLeaf, SiteAdmitted, SiteRevoked, StatementLogged, rotate_key
from pathfed_common.provenance.log_witness import Head, Judgement, PlacedProof, Refusal, judge
from pathfed_common.provenance.merkle import EMPTY_ROOT, MemoryNodeStore
from pathfed_common.provenance.note import Note, NoteKey
from pathfed_common.units import UtcSeconds

ORIGIN = "consortium.example/run-1"
_AT = UtcSeconds(1.7e9)


@dataclass
class Operator:
    """Keeps a log: leaves, nodes, and a key to sign checkpoints with."""

    key: SigningKey
    leaves: list[bytes] = field(default_factory=list)
    nodes: MemoryNodeStore = field(default_factory=MemoryNodeStore)
    notes: list[Note] = field(default_factory=list)

    @property
    def public(self) -> NoteKey:
        return log_key(ORIGIN, self.key.public)

    def add(self, *leaves: AnyLeaf) -> None:
        merkle.append(self.nodes, len(self.leaves), [leaf.hash for leaf in leaves])
        self.leaves += [leaf.to_bytes() for leaf in leaves]

    def checkpoint(self, size: int | None = None, **change: object) -> Note:
        size = len(self.leaves) if size is None else size
        honest = Checkpoint(origin=ORIGIN, size=size, root=merkle.root(self.nodes, size))
        return sign_checkpoint(replace(honest, **change), self.key)  # type: ignore[arg-type]

    def proof(self, leaf: bytes, size: int | None = None) -> PlacedProof:
        index = self.leaves.index(leaf)
        return PlacedProof(index, merkle.inclusion_proof(self.nodes, index, len(self.leaves) if size is None else size))

    def consistency(self, last: Head | None) -> tuple[bytes, ...]:
        return () if last is None else merkle.consistency_proof(self.nodes, last.size, len(self.leaves))

    def fork(self) -> "Operator":
        other = Operator(self.key, notes=[*self.notes])
        merkle.append(other.nodes, 0, [merkle.leaf_hash(leaf) for leaf in self.leaves])
        other.leaves = [*self.leaves]
        return other

    def gather(self, *sites: "Site", own: Collection[bytes] = ()) -> Note:
        """Publish a checkpoint and ask these sites to cosign it."""
        signed = self.checkpoint()
        for site in sites:
            signed = site.answer(self, signed, own)
        self.notes.append(signed)
        return signed

    def history(self) -> History:
        return read_history(self.leaves, self.notes, self.public)


@dataclass
class Site:
    """A site that keeps to `judge`."""

    name: SiteName
    key: SigningKey = field(default_factory=SigningKey.generate)
    last: Head | None = None
    judgements: list[Judgement] = field(default_factory=list)

    @property
    def admission(self) -> SiteAdmitted:
        return SiteAdmitted(site=self.name, evidence_key=self.key.public, at=_AT)

    def answer(self, log: Operator, signed: Note, own: Collection[bytes] = ()) -> Note:
        proofs = {leaf: log.proof(leaf) for leaf in own if leaf in log.leaves}
        try:
            consistency = log.consistency(self.last)
        except ValueError:
            consistency = ()
        found = judge(signed, log.public, last=self.last, consistency=consistency, own=own, proofs=proofs)
        self.judgements.append(found)
        if found.checkpoint is None:
            return signed
        self.last = found.head
        return signed.with_signature(cosign_checkpoint(found.checkpoint, self.name, self.key, at=1_700_000_000))


def statement(site: str, index: int, what: bytes = b"") -> StatementLogged:
    return StatementLogged(site=SiteName(site), run=RunName("run-1"), round_index=index, statement=digest.of_bytes(what))


@pytest.fixture
def sites() -> dict[str, Site]:
    return {name: Site(SiteName(name)) for name in ("a", "b", "c")}


@pytest.fixture
def log(sites: dict[str, Site]) -> Operator:
    """Three sites, cosigned by all, then a round of statements, cosigned by a and b."""
    operator = Operator(SigningKey.generate())
    operator.add(*(site.admission for site in sites.values()))
    operator.gather(*sites.values())
    operator.add(*(statement(name, 1) for name in sites))
    operator.gather(sites["a"], sites["b"], own=[])
    return operator


# What a site signs.


def _judged(log: Operator, signed: Note | None = None, **change: object) -> Judgement:
    last = Head(3, merkle.root(log.nodes, 3))
    leaf = statement("a", 1).to_bytes()
    given: dict[str, object] = {"last": last, "consistency": log.consistency(last), "own": [leaf], "proofs": {leaf: log.proof(leaf)}}
    return judge(signed or log.checkpoint(), log.public, **{**given, **change})  # type: ignore[arg-type]


def test_a_site_cosigns_what_grew_and_holds_its_leaves(log: Operator) -> None:
    found = _judged(log)
    assert found.refusal is None
    assert found.head == Head(6, merkle.root(log.nodes, 6))
    again = _judged(log, last=found.head, consistency=(), own=[])
    assert again.head == found.head
    first = _judged(log, last=None, consistency=())
    assert first.head == found.head


def test_a_site_refuses_what_another_signed(log: Operator) -> None:
    stranger = replace(log, key=SigningKey.generate())
    assert _judged(log, stranger.checkpoint()).refusal is Refusal.NOT_THE_LOGS
    assert _judged(log, log.checkpoint(origin="consortium.example/run-2")).refusal is Refusal.NOT_THE_LOGS
    with pytest.raises(ValueError, match="not-the-logs"):
        _ = _judged(log, stranger.checkpoint()).head


def test_a_site_refuses_what_nothing_can_check(log: Operator) -> None:
    assert _judged(log, log.checkpoint(extensions=("trust me",))).refusal is Refusal.EXTENSIONS
    assert _judged(log, log.checkpoint(size=0, root=EMPTY_ROOT), last=None, consistency=(), own=[]).refusal is Refusal.EMPTY


def test_a_site_refuses_a_log_that_shrank_forked_or_was_rewritten(log: Operator, sites: dict[str, Site]) -> None:
    assert _judged(log, log.checkpoint(2)).refusal is Refusal.SMALLER
    assert _judged(log, log.checkpoint(size=3, root=bytes(32))).refusal is Refusal.FORKED
    assert _judged(log, consistency=()).refusal is Refusal.NOT_CONSISTENT
    assert _judged(log, last=None).refusal is Refusal.NOT_CONSISTENT
    assert _judged(log, last=Head(3, bytes(32))).refusal is Refusal.NOT_CONSISTENT
    rewritten = Operator(log.key)
    rewritten.add(*(sites[name].admission for name in "bac"), *(statement(name, 1) for name in "abc"))
    for proof in (log.consistency(Head(3, b"")), rewritten.consistency(Head(3, b""))):
        assert _judged(log, rewritten.checkpoint(), consistency=proof).refusal is Refusal.NOT_CONSISTENT


def test_a_site_refuses_a_log_without_its_leaves(log: Operator) -> None:
    leaf, absent = statement("a", 1).to_bytes(), statement("a", 2).to_bytes()
    proof = log.proof(leaf)
    assert _judged(log, own=[leaf, absent]) == Judgement(Refusal.LEAF_MISSING, missing=(absent,))
    assert _judged(log, proofs={}).missing == (leaf,)
    assert _judged(log, proofs={leaf: replace(proof, index=proof.index + 1)}).missing == (leaf,)
    assert _judged(log, own=[absent], proofs={absent: proof}).missing == (absent,)
    assert _judged(log, proofs={leaf: PlacedProof(3, merkle.inclusion_proof(log.nodes, 3, 5))}).missing == (leaf,)


def test_a_forked_log_shown_to_two_sites_gets_a_quorum_on_one_side_only(log: Operator, sites: dict[str, Site]) -> None:
    forged = log.fork()
    log.add(statement("a", 2, b"honest"))
    forged.add(statement("a", 2, b"forged"))
    log.gather(sites["a"], sites["b"])
    forged.gather(sites["c"], sites["a"], sites["b"])
    assert sites["a"].judgements[-1].refusal is Refusal.FORKED
    forged.add(statement("b", 2), statement("c", 2))
    forged.gather(*sites.values())
    assert sites["a"].judgements[-1].refusal is Refusal.NOT_CONSISTENT
    assert sites["c"].judgements[-1].refusal is None
    assert not log.history().shortfalls
    assert [(short.index, short.cosigned) for short in forged.history().shortfalls] == [(None, {"c"})]


# What a verifier reads.


def test_an_honest_history_has_a_quorum(log: Operator, sites: dict[str, Site]) -> None:
    found = log.history()
    assert not found.shortfalls
    assert found.roll.enrolled == {site.name: site.key.public for site in sites.values()}
    assert [checkpoint.size for checkpoint in found.checkpoints] == [3, 6]
    assert {size: {member.site for member in members} for size, members in found.cosigned.items()} == {3: {"a", "b", "c"}, 6: {"a", "b"}}
    assert [leaf.to_bytes() for leaf in found.leaves] == log.leaves
    assert read_history(log.leaves, log.notes[::-1], log.public) == found


def test_cosignatures_of_one_size_are_put_together(log: Operator, sites: dict[str, Site]) -> None:
    log.add(statement("a", 2))
    log.gather(sites["a"])
    assert log.history().shortfalls
    log.gather(sites["b"])
    assert not log.history().shortfalls


def test_the_operator_does_not_count(log: Operator, sites: dict[str, Site]) -> None:
    """Neither its signature as the log, nor a line in its own or a site's name by its own key."""
    log.add(statement("a", 2))
    signed = log.gather(sites["a"])
    checkpoint = Checkpoint.from_text(signed.text)
    for name in ("operator", "b"):
        signed = signed.with_signature(cosign_checkpoint(checkpoint, SiteName(name), log.key, at=1))
    log.notes[-1] = signed
    assert [short.cosigned for short in log.history().shortfalls] == [{"a"}]


def test_a_rotated_key_counts_and_the_old_one_no_longer_does(log: Operator, sites: dict[str, Site]) -> None:
    old, new = sites["b"].key, SigningKey.generate()
    log.add(rotate_key(SiteName("b"), old, new, _AT))
    log.gather(sites["a"], sites["b"])
    assert log.history().shortfalls, "cosigned by the key that was handed over"
    log.notes.pop()
    sites["b"].key = new
    log.gather(sites["a"], sites["b"])
    assert not log.history().shortfalls


def test_a_revoked_site_may_cosign_its_revocation_and_counts_in_it(log: Operator, sites: dict[str, Site]) -> None:
    log.add(SiteRevoked(site=SiteName("c"), at=_AT))
    log.gather(sites["a"], sites["c"])
    assert [(short.index, short.cosigned) for short in log.history().shortfalls] == [(None, {"a"})]
    log.gather(sites["b"])
    assert not log.history().shortfalls


def _unreadable(leaves: list[bytes], notes: list[Note], key: NoteKey) -> ErrorCode:
    with pytest.raises(ProvenanceError) as caught:
        read_history(leaves, notes, key)
    return caught.value.code


def test_dropping_reordering_or_changing_a_leaf_is_found(log: Operator) -> None:
    for index, leaf in enumerate(log.leaves):
        without = [*log.leaves[:index], *log.leaves[index + 1 :]]
        assert _unreadable(without, log.notes, log.public) == ErrorCode.RECORD_CHANGED
        if index < len(without):
            assert _unreadable([*without, leaf], log.notes, log.public) == ErrorCode.RECORD_CHANGED
        for place in range(len(leaf)):
            changed = leaf[:place] + bytes([leaf[place] ^ 1]) + leaf[place + 1 :]
            assert _unreadable([*log.leaves[:index], changed, *log.leaves[index + 1 :]], log.notes, log.public) == ErrorCode.RECORD_CHANGED
    assert _unreadable([*log.leaves, statement("a", 2).to_bytes()], log.notes, log.public) == ErrorCode.RECORD_CHANGED


def test_a_changed_checkpoint_is_found(log: Operator) -> None:
    honest = log.notes[-1]
    data = honest.to_bytes()
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        try:
            found = read_history(log.leaves, [log.notes[0], Note.from_bytes(changed)], log.public)
        except ProvenanceError:
            continue
        # A site's name or key id was hit: the line is of nobody known, and the site no longer counts.
        assert len(found.cosigned[6]) == 1
        assert found.shortfalls


def test_a_checkpoint_that_is_not_of_these_leaves_is_found(log: Operator) -> None:
    assert _unreadable(log.leaves, [], log.public) == ErrorCode.RECORD_CHANGED
    assert _unreadable(log.leaves, log.notes[:1], log.public) == ErrorCode.RECORD_CHANGED
    for size in (0, 3, 6):
        forged = log.checkpoint(size=size, root=bytes(32))
        assert _unreadable(log.leaves, [*log.notes, forged], log.public) == ErrorCode.RECORD_CHANGED
    other = log_key("consortium.example/run-2", log.key.public)
    assert _unreadable(log.leaves, log.notes, other) == ErrorCode.RECORD_SIGNATURE
    empty = log.checkpoint(size=0, root=EMPTY_ROOT)
    assert not read_history(log.leaves, [empty, *log.notes], log.public).shortfalls
