"""Who is enrolled, what makes a quorum, and that two histories cannot both have one without sites that sign both."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_leaves import AnyLeaf, KeyRotated, PlanPublished, SiteAdmitted, SiteRevoked, rotate_key
from pathfed_common.provenance.log_quorum import Member, Roll, has_quorum, least_double_signers, quorum_of, roll_of, shortfalls
from pathfed_common.units import UtcSeconds

_AT = UtcSeconds(1.7e9)
#: Made once: keys cost more than all else here, and a log must never see one twice, so each log takes them in order.
_KEYS = [SigningKey.generate() for _ in range(64)]


def _leaf(text: str) -> PlanPublished:
    return PlanPublished(plan=digest.of_bytes(text.encode()))


@dataclass
class _Writer:
    """An operator who writes a log, and may write a second one."""

    leaves: list[AnyLeaf] = field(default_factory=list)
    next_key: int = 0

    def admit(self, *sites: str) -> "_Writer":
        for site in sites:
            self.leaves.append(SiteAdmitted(site=SiteName(site), evidence_key=_KEYS[self.next_key].public, at=_AT))
            self.next_key += 1
        return self

    def revoke(self, *sites: str) -> "_Writer":
        self.leaves += [SiteRevoked(site=SiteName(site), at=_AT) for site in sites]
        return self

    def add(self, text: str) -> "_Writer":
        self.leaves.append(_leaf(text))
        return self

    def fork(self, text: str) -> "_Writer":
        """Another history with the same leaves so far and another next one."""
        return _Writer([*self.leaves], self.next_key).add(text)

    @property
    def roll(self) -> Roll:
        return roll_of(self.leaves)

    def cosigned(self, *sites: str, at: Iterable[int] | None = None) -> dict[int, frozenset[Member]]:
        """Cosignatures of every member, present or former, that has one of these names."""
        members = frozenset(member for member in (*self.roll.members, *self.roll.former) if member.site in sites)
        return dict.fromkeys([len(self.leaves)] if at is None else at, members)


def _refused(leaves: Sequence[AnyLeaf], code: ErrorCode = ErrorCode.RECORD_CHANGED) -> str:
    with pytest.raises(ProvenanceError) as caught:
        roll_of(leaves)
    assert caught.value.code == code
    return str(caught.value)


def _naive(roll: Roll, cosigned: Mapping[int, Iterable[Member]]) -> bool:
    """The rule that looks sufficient: more than half of those enrolled in the checkpoint at hand."""
    return len(set(cosigned.get(roll.size, ())) & set(roll.members)) >= quorum_of(len(roll.members))


# Who is enrolled.


def test_the_roll_follows_admissions_revocations_and_rotations() -> None:
    old, new, other = _KEYS[0], _KEYS[40], _KEYS[1]
    log = _Writer().admit("a", "b").add("x")
    assert log.roll.enrolled == {"a": old.public, "b": other.public}
    log.leaves.append(rotate_key(SiteName("a"), old, new, _AT))
    log.revoke("b")
    assert log.roll.enrolled == {"a": new.public}
    assert log.roll.former == {Member(1, SiteName("b")): other.public}
    assert [(change.index, {member.site for member in change.before}) for change in log.roll.changes] == [
        (0, set()),
        (1, {"a"}),
        (4, {"a", "b"}),
    ]
    assert log.roll.size == 5


def test_a_name_that_comes_back_is_another_member() -> None:
    log = _Writer().admit("a", "b").revoke("a").admit("a")
    assert set(log.roll.members) == {Member(1, SiteName("b")), Member(3, SiteName("a"))}
    assert set(log.roll.former) == {Member(0, SiteName("a"))}


def test_leaves_that_cannot_follow_are_refused() -> None:
    a, b, c = _KEYS[:3]
    admitted = _Writer().admit("a", "b").leaves
    assert "enrolled" in _refused([*admitted, SiteAdmitted(site=SiteName("a"), evidence_key=c.public, at=_AT)])
    assert "not enrolled" in _refused([*admitted, SiteRevoked(site=SiteName("c"), at=_AT)])
    assert "not enrolled" in _refused([*admitted, rotate_key(SiteName("c"), a, c, _AT)])
    assert "not the site's" in _refused([*admitted, rotate_key(SiteName("a"), b, c, _AT)])
    assert "leaf 2" in _refused([*admitted, SiteRevoked(site=SiteName("c"), at=_AT)])
    forged = KeyRotated.from_plain({**rotate_key(SiteName("a"), a, c, _AT).plain(), "at": 1.8e9})
    assert "both keys" in _refused([*admitted, forged], ErrorCode.RECORD_SIGNATURE)


def test_no_key_serves_twice() -> None:
    """One key under two names would vote twice with one signature, which does not say whose it is."""
    a, b, c = _KEYS[:3]
    admitted = _Writer().admit("a", "b").leaves
    again = SiteAdmitted(site=SiteName("c"), evidence_key=a.public, at=_AT)
    assert "named before" in _refused([*admitted, again])
    assert "named before" in _refused([*admitted, SiteRevoked(site=SiteName("a"), at=_AT), again])
    assert "named before" in _refused([*admitted, rotate_key(SiteName("a"), a, b, _AT)])
    rotated = [*admitted, rotate_key(SiteName("a"), a, c, _AT)]
    assert "named before" in _refused([*rotated, again])
    assert "named before" in _refused([*rotated, rotate_key(SiteName("a"), c, a, _AT)])


# What makes a quorum.


@pytest.mark.parametrize(("sites", "quorum", "double"), [(0, 1, 2), (1, 1, 1), (2, 2, 2), (3, 2, 1), (4, 3, 2), (5, 3, 1), (50, 26, 2)])
def test_a_quorum_is_more_than_half(sites: int, quorum: int, double: int) -> None:
    assert quorum_of(sites) == quorum
    assert least_double_signers(sites) == double


def test_more_than_half_of_the_enrolled_make_a_quorum_and_half_do_not() -> None:
    log = _Writer().admit("a", "b", "c", "d").add("x")
    assert has_quorum(log.roll, log.cosigned("a", "b", "c"))
    (short,) = [short for short in shortfalls(log.roll, log.cosigned("a", "b")) if short.index is None]
    assert (short.cosigned, short.of) == ({"a", "b"}, {"a", "b", "c", "d"})
    assert not has_quorum(log.roll, {})


def test_the_end_of_the_history_counts_not_some_earlier_checkpoint() -> None:
    log = _Writer().admit("a", "b", "c").add("x").add("y")
    assert not has_quorum(log.roll, log.cosigned("a", "b", "c", at=[4]))
    assert has_quorum(log.roll, log.cosigned("a", "b", "c", at=[4, 5]))
    assert not has_quorum(log.roll, log.cosigned("a", "b", "c", at=[6]))


def test_a_log_in_which_nobody_is_enrolled_has_no_quorum() -> None:
    assert not has_quorum(Roll(), {0: frozenset()})
    assert not has_quorum(_Writer().add("x").roll, {1: frozenset()})


def test_a_change_must_be_cosigned_by_those_before_it_and_later_checkpoints_count() -> None:
    log = _Writer().admit("a", "b", "c").add("x").revoke("c").add("y").admit("d", "e", "f", "g").add("z")
    every = log.cosigned("a", "b", "d", "e", "f", "g")
    assert has_quorum(log.roll, every)
    # Four of the six enrolled at the end, but only one of the two who were there when the others came.
    short = shortfalls(log.roll, log.cosigned("b", "d", "e", "f", "g"))
    assert [(found.index, found.of) for found in short][:2] == [(1, {"a"}), (2, {"a", "b"})]
    assert (6, {"a", "b"}) in [(found.index, found.of) for found in short]
    # A member that was revoked in between counts for what came before, at the checkpoint where it signed.
    mixed = {5: log.cosigned("a", "b", "c", at=[5])[5], 6: log.cosigned("a", "b", at=[6])[6], 11: log.cosigned("a", "b", "d", "e")[11]}
    assert has_quorum(log.roll, mixed)


def test_a_verifier_who_leaves_out_members_it_does_not_trust_is_not_outvoted() -> None:
    log = _Writer().admit("a", "b", "puppet-1", "puppet-2", "puppet-3").add("x")
    everybody = log.cosigned("a", "b", "puppet-1", "puppet-2", "puppet-3")
    trusted = {size: frozenset(member for member in members if member.site in ("a", "b")) for size, members in everybody.items()}
    assert has_quorum(log.roll, everybody)
    assert not has_quorum(log.roll, trusted)


# Attacks: an operator with a second history, in which honest sites that are kept on the first have no say.

_FOUNDERS = ("a", "b", "c", "d", "e")


def _honest() -> tuple[_Writer, dict[int, frozenset[Member]]]:
    """A log of five sites and one more leaf; a, b and c are shown it and cosign, d and e are held back for the other."""
    common = _Writer().admit(*_FOUNDERS)
    log = common.fork("honest")
    shared = common.cosigned(*_FOUNDERS)
    return log, {**shared, **log.cosigned("a", "b", "c")}


def test_revoking_the_objecting_sites_on_a_fork_gives_no_quorum() -> None:
    honest, cosigned = _honest()
    fork = _Writer().admit(*_FOUNDERS).fork("forged").revoke("a", "b", "c")
    theirs = {**_Writer().admit(*_FOUNDERS).cosigned(*_FOUNDERS), **fork.cosigned("d", "e")}
    assert has_quorum(honest.roll, cosigned)
    assert _naive(fork.roll, theirs), "the planted fault: counted at the checkpoint at hand, the fork has its quorum"
    assert not has_quorum(fork.roll, theirs)
    assert {short.index for short in shortfalls(fork.roll, theirs)} == {6, 7}


def test_a_fork_that_begins_with_the_revocations_is_not_covered_by_what_was_cosigned_before() -> None:
    common = _Writer().admit(*_FOUNDERS)
    fork = _Writer([*common.leaves], common.next_key).revoke("a", "b", "c")
    theirs = {**common.cosigned(*_FOUNDERS), **fork.cosigned("d", "e")}
    assert _naive(fork.roll, theirs)
    assert [short.index for short in shortfalls(fork.roll, theirs)] == [5, 6]


def test_admitting_sites_of_its_own_on_a_fork_gives_the_operator_no_quorum() -> None:
    honest, cosigned = _honest()
    puppets = [f"puppet-{number}" for number in range(6)]
    fork = _Writer().admit(*_FOUNDERS).fork("forged").admit(*puppets)
    theirs = {**_Writer().admit(*_FOUNDERS).cosigned(*_FOUNDERS), **fork.cosigned("d", "e", *puppets)}
    assert has_quorum(honest.roll, cosigned)
    assert _naive(fork.roll, theirs)
    assert not has_quorum(fork.roll, theirs)


def test_giving_an_objecting_sites_name_to_another_key_gives_no_vote() -> None:
    fork = _Writer().admit(*_FOUNDERS).fork("forged").revoke("a").admit("a").revoke("b").admit("b")
    members = frozenset(member for member in fork.roll.members if member.site in ("a", "b", "d", "e"))
    assert _naive(fork.roll, {fork.roll.size: members})
    assert not has_quorum(fork.roll, {5: _Writer().admit(*_FOUNDERS).cosigned(*_FOUNDERS)[5], fork.roll.size: members})


def test_revoking_everybody_ends_the_log_for_good() -> None:
    log = _Writer().admit("a").revoke("a").admit("puppet").add("x")
    cosigned = log.cosigned("a", "puppet")
    assert [short.index for short in shortfalls(log.roll, cosigned)] == [2]


@pytest.mark.parametrize("sites", range(1, 9))
def test_as_many_double_signers_as_stated_are_enough_and_one_fewer_is_not(sites: int) -> None:
    """The bound is exact, in both directions: all ways to divide the sites between two histories."""
    names = [f"s{number}" for number in range(sites)]
    common = _Writer().admit(*names)
    forks = [common.fork("one"), common.fork("two")]

    def both(double: int) -> bool:
        for share in range(sites - double + 1):
            first, second = names[: share + double], names[share:]
            cosigned = [{**common.cosigned(*names), **fork.cosigned(*who)} for fork, who in zip(forks, (first, second), strict=True)]
            if all(has_quorum(fork.roll, found) for fork, found in zip(forks, cosigned, strict=True)):
                return True
        return False

    assert both(least_double_signers(sites))
    assert not both(least_double_signers(sites) - 1)


_EVENTS = st.lists(st.tuples(st.sampled_from(["add", "admit", "revoke", "return"]), st.integers(0, 9)), max_size=6)


def _write(log: _Writer, events: Sequence[tuple[str, int]], label: str) -> _Writer:
    """Write what fits of these events."""
    for number, (what, which) in enumerate(events):
        roll = log.roll
        enrolled = sorted(roll.enrolled)
        gone = sorted({member.site for member in roll.former} - set(enrolled))
        if what == "admit":
            log.admit(f"{label}-{number}")
        elif what == "revoke" and enrolled:
            log.revoke(enrolled[which % len(enrolled)])
        elif what == "return" and gone:
            log.admit(gone[which % len(gone)])
        else:
            log.add(f"{label} {number}")
    return log


@settings(max_examples=400)
@given(founders=st.integers(1, 6), before=_EVENTS, branches=st.tuples(_EVENTS, _EVENTS), data=st.data())
def test_two_histories_never_both_have_a_quorum_with_fewer_double_signers(
    founders: int,
    before: Sequence[tuple[str, int]],
    branches: tuple[Sequence[tuple[str, int]], Sequence[tuple[str, int]]],
    data: st.DataObject,
) -> None:
    """The claim, against an operator who writes what it likes and whose own sites, and all former ones, sign everything."""
    common = _write(_Writer().admit(*(f"founder-{number}" for number in range(founders))), before, "before")
    voters = sorted(common.roll.members)
    if not voters:
        return
    order = data.draw(st.permutations(voters))
    double = data.draw(st.integers(0, min(len(voters), least_double_signers(len(voters)) - 1)))
    share = data.draw(st.integers(0, len(voters) - double))
    sides = (set(order[: share + double]), set(order[share:]))
    verdicts = []
    for label, branch, side in zip(("one", "two"), branches, sides, strict=True):
        # The second history may begin with a change of membership; no leaf of its own is the first one's next.
        begun = common.fork("one") if label == "one" else _Writer([*common.leaves], common.next_key)
        log = _write(begun, [*branch, ("add", 0)], label)
        sizes = {len(log.leaves), *range(len(common.leaves) + 1, len(log.leaves))}
        roll = log.roll
        others = {*roll.members, *roll.former} - set(voters)
        cosigned: dict[int, set[Member]] = dict.fromkeys(sizes, side | others)
        cosigned.update(dict.fromkeys(range(1, len(common.leaves) + 1), set(voters) | others))
        verdicts.append(has_quorum(roll, cosigned))
    event(f"histories with a quorum: {sum(verdicts)}")
    assert sum(verdicts) < 2
