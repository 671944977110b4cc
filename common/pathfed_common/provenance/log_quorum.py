"""Who is enrolled, who has cosigned, and whether that is enough: so that no second history of a log can be. Pure.

The operator writes the log, admissions and revocations included, so a rule that counts cosignatures against the sites enrolled *in the
checkpoint at hand* protects from nothing: on a second history the operator revokes the sites that would object, or admits sites of its own,
and has its majority. The rule is therefore about every set of sites that a history went through:

    A history of N leaves has a quorum if
    (1) for every admission and revocation in it, more than half of the sites enrolled just before that leaf have cosigned a checkpoint of
        this history that contains the leaf, and
    (2) more than half of the sites enrolled at its end have cosigned the checkpoint of all N leaves.

The cosignatures of (1) may be on different checkpoints, and on later ones. The operator's own signature counts nowhere.

*Claim.* Let two histories share their first f leaves and then differ, and let n > 0 sites be enrolled after those f. If both have a quorum,
at least `least_double_signers(n)` of these n sites have cosigned checkpoints of both beyond the f-th leaf.

*Argument.* Take one history. If membership changes in it at or after leaf f, the set just before its first such change is the set after f
leaves, and (1) gives more than half of it with a checkpoint larger than f. If not, the set at the end is that set, and (2) gives the same,
since N > f. So in each history floor(n/2) + 1 or more of the same n sites have cosigned beyond f, and two such groups share at least
2 (floor(n/2) + 1) - n sites: 1 if n is odd, 2 if n is even. Checkpoints of the two beyond f are inconsistent: each fixes leaf f otherwise.

*Assumption.* A site that keeps to `log_witness.judge`, and never loses what it last cosigned, does not cosign both. So a fork needs as many
colluding (or robbed, or restored from an old backup) sites as the claim says, which is one or two: more than half is protection from the
operator alone, not from an operator with accomplices. What accomplices did stays provable, by their two signatures.

| not protected | what helps |
| --- | --- |
| forks before the first admission: those are two logs, each honest to its own sites | compare the founding checkpoint out of band |
| a majority that the operator admitted for itself, in the open | the verifier's own list of keys; sites read admissions |
| a log whose last site is revoked: nobody is left to object | (1) then fails for the next admission, for good |

A member is one admission: a name that comes back after a revocation is another member, so that the operator cannot give an objecting site's
vote to a key of its own by revoking and admitting its name. A member's key changes only by a leaf that both keys signed, and no key serves
twice in a log, for a cosignature does not say whose it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import note
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.log_checkpoint import site_key
from pathfed_common.provenance.log_leaves import AnyLeaf, KeyRotated, SiteAdmitted, SiteRevoked
from pathfed_common.provenance.note import Note


@dataclass(frozen=True, order=True)
class Member:
    """One admission of a site: what votes.

    Attributes:
        admitted: index of the admission's leaf.
        site: the site's name.
    """

    admitted: int
    site: SiteName


@dataclass(frozen=True)
class Change:
    """A leaf that changed who is enrolled.

    Attributes:
        index: the leaf's place in the log.
        before: the members enrolled just before it.
    """

    index: int
    before: frozenset[Member]


@dataclass(frozen=True)
class Roll:
    """Who is and was enrolled after the first `size` leaves of a log. Start from ``Roll()`` and go on with `after`.

    Attributes:
        size: leaves read.
        members: those enrolled, with their evidence keys.
        former: those revoked, with their last keys. They may still cosign the leaf that revoked them.
        changes: every admission and revocation so far.
        used: every evidence key the log has named.
    """

    size: int = 0
    members: Mapping[Member, VerifyKey] = field(default_factory=dict)
    former: Mapping[Member, VerifyKey] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    used: frozenset[VerifyKey] = frozenset()

    @property
    def enrolled(self) -> dict[SiteName, VerifyKey]:
        """The enrolled sites and their evidence keys."""
        return {member.site: key for member, key in sorted(self.members.items(), key=lambda item: item[0])}

    def after(self, leaf: AnyLeaf, *, where: str = "log") -> "Roll":
        """The roll with one more leaf.

        Raises:
            ProvenanceError: PF601, the leaf cannot follow: it admits a site that is enrolled, revokes or rotates one that is not, names a
                key the log has named before, or hands over from another key than the site's; PF602, a rotation that both keys did not sign.
        """
        here = f"{where}, leaf {self.size}"
        match leaf:
            case SiteAdmitted():
                rolled = self._admit(leaf, here)
            case SiteRevoked():
                rolled = self._revoke(leaf, here)
            case KeyRotated():
                rolled = self._rotate(leaf, here)
            case _:
                rolled = self
        return replace(rolled, size=self.size + 1)

    def _admit(self, leaf: SiteAdmitted, where: str) -> "Roll":
        if leaf.site in self.enrolled:
            raise _fault("admits a site that is enrolled", where, leaf.site)
        member = Member(self.size, leaf.site)
        return replace(
            self,
            members={**self.members, member: leaf.evidence_key},
            changes=(*self.changes, self._change()),
            used=self._with_key(leaf.evidence_key, where),
        )

    def _revoke(self, leaf: SiteRevoked, where: str) -> "Roll":
        member = self._member(leaf.site, where)
        members = dict(self.members)
        former = {**self.former, member: members.pop(member)}
        return replace(self, members=members, former=former, changes=(*self.changes, self._change()))

    def _rotate(self, leaf: KeyRotated, where: str) -> "Roll":
        member = self._member(leaf.site, where)
        if self.members[member] != leaf.old_key:
            raise _fault("rotates from a key that is not the site's", where, leaf.site)
        if not leaf.authentic:
            raise _fault("rotates without the signatures of both keys", where, leaf.site, ErrorCode.RECORD_SIGNATURE)
        return replace(self, members={**self.members, member: leaf.new_key}, used=self._with_key(leaf.new_key, where))

    def _change(self) -> Change:
        return Change(self.size, frozenset(self.members))

    def _member(self, site: SiteName, where: str) -> Member:
        for member in self.members:
            if member.site == site:
                return member
        raise _fault("is about a site that is not enrolled", where, site)

    def _with_key(self, key: VerifyKey, where: str) -> frozenset[VerifyKey]:
        if key in self.used:
            raise _fault("names a key that the log has named before", where, key.to_text())
        return self.used | {key}


@dataclass(frozen=True)
class Shortfall:
    """Where a history lacks cosignatures.

    Attributes:
        index: the membership change that too few have cosigned; None for the end of the history.
        cosigned: those who have.
        of: the sites of which more than half should have.
    """

    index: int | None
    cosigned: frozenset[SiteName]
    of: frozenset[SiteName]


def roll_of(leaves: Iterable[AnyLeaf], *, where: str = "log") -> Roll:
    """The roll after these leaves, the first of the log first.

    Raises:
        ProvenanceError: PF601 or PF602, a leaf cannot follow; see `Roll.after`.
    """
    roll = Roll()
    for leaf in leaves:
        roll = roll.after(leaf, where=where)
    return roll


def cosigned_by(signed: Note, origin: str, roll: Roll, *, where: str = "checkpoint") -> frozenset[Member]:
    """The members who have cosigned a checkpoint, each by the key it has, or last had, after the checkpoint's leaves.

    Args:
        signed: the checkpoint's note.
        origin: the log's origin.
        roll: the roll at the checkpoint's size.
        where: what to call the checkpoint in errors.

    Raises:
        ProvenanceError: PF602, a member's line does not verify.
    """
    members = {site_key(origin, member.site, key): member for member, key in (*roll.former.items(), *roll.members.items())}
    names = {(line.name, line.key_id) for line in signed.signatures}
    keys = [key for key in members if (key.name, key.key_id) in names]
    return frozenset(members[seen.key] for seen in note.verify(signed, keys, where=where)) if keys else frozenset()


def shortfalls(roll: Roll, cosigned: Mapping[int, Iterable[Member]]) -> tuple[Shortfall, ...]:
    """Where the history that ends with this roll lacks a quorum; empty if it has one.

    Args:
        roll: the roll at the history's end.
        cosigned: for checkpoints of this very history, by size, the members who cosigned; see `cosigned_by`. A verifier who knows sites'
            keys leaves out members whose keys it does not trust: they then weigh against a quorum and not for it.
    """
    reach: dict[Member, int] = {}
    for size in sorted(size for size in cosigned if size <= roll.size):
        reach.update(dict.fromkeys(cosigned[size], size))
    # Before the first admission nobody is enrolled who could cosign.
    wanted = [(change.index, change.index + 1, change.before) for change in roll.changes[1:]]
    short = []
    for index, size, members in [*wanted, (None, roll.size, frozenset(roll.members))]:
        found = {member for member in members if reach.get(member, 0) >= size}
        if len(found) < quorum_of(len(members)):
            short.append(Shortfall(index, _sites(found), _sites(members)))
    return tuple(short)


def has_quorum(roll: Roll, cosigned: Mapping[int, Iterable[Member]]) -> bool:
    """Whether the history has a quorum; arguments as of `shortfalls`."""
    return not shortfalls(roll, cosigned)


def quorum_of(sites: int) -> int:
    """How many of so many sites are more than half of them. Of none, one: a set nobody is in has no quorum."""
    return sites // 2 + 1


def least_double_signers(sites: int) -> int:
    """How many of the sites enrolled where two histories part have cosigned both, at the least, if both have a quorum."""
    return 2 * quorum_of(sites) - sites


def _sites(members: Iterable[Member]) -> frozenset[SiteName]:
    return frozenset(member.site for member in members)


def _fault(what: str, where: str, value: str, code: ErrorCode = ErrorCode.RECORD_CHANGED) -> ProvenanceError:
    return ProvenanceError(code, f"the log's leaf {what}", where=where, value=value)
