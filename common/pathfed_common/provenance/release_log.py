"""Whether the transparency log tells the same story as a record, in an order that can be. Pure.

What holds when `log_faults` yields nothing, for a log whose history was read by `log_history.read_history`:

    - The plan was published, and each admitted site approved it with the approval in the record, which stood when the round began.
    - Each statement of the record is one leaf, and the log has no statement of this run that the record lacks: no update was dropped.
    - Statements of a round lie between the state that it starts from and the state that it ends with: none was moved to another round
      or put in afterwards.
    - Each was signed with the key that the log names for the site at the time.
    - The states are the record's, each once, in order, and the release follows the last.

A round is offered to sites that are enrolled and have approved; what a site revokes while its update is on the way holds from the next
round on. So approval and key count that stood at any time since the last state.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import record
from pathfed_common.provenance.consistency import Contents
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.log_leaves import (
    AnyLeaf,
    EncoderCommitted,
    KeyRotated,
    PlanApproved,
    PlanDecided,
    PlanPublished,
    Released,
    SiteAdmitted,
    SiteRevoked,
    StatementLogged,
)

_LEAVES = "log/leaves.jsonl"

Faults = Iterator[ProvenanceError]


def log_faults(leaves: Iterable[AnyLeaf], contents: Contents, keys: Mapping[SiteName, VerifyKey], release: Digest) -> Faults:
    """Where the log and the record disagree.

    Args:
        leaves: every leaf of the log, in order.
        contents: the record's documents.
        keys: the key that the record's documents of each site are signed with.
        release: digest of the release's envelope.
    """
    walk = _Walk(contents, keys, release)
    for index, leaf in enumerate(leaves):
        for what, value in walk.take(leaf):
            yield _fault(what, value, f"{_LEAVES}, leaf {index}")
    yield from walk.missing()


def key_families(leaves: Iterable[AnyLeaf], trusted: Mapping[SiteName, VerifyKey]) -> dict[SiteName, frozenset[VerifyKey]]:
    """For each site with a trusted key, the keys that are its as well: linked to it by rotations, each of which both its keys signed.

    Who holds a key says of the key before that it handed over, and of the key after that it took over. So trust goes both ways.
    """
    rotations = [leaf for leaf in leaves if isinstance(leaf, KeyRotated) and leaf.site in trusted and leaf.authentic]
    found = {site: {key} for site, key in trusted.items()}
    for leaf in (*rotations, *reversed(rotations)):
        if leaf.old_key in found[leaf.site] or leaf.new_key in found[leaf.site]:
            found[leaf.site] |= {leaf.old_key, leaf.new_key}
    return {site: frozenset(keys) for site, keys in found.items()}


_Fault = tuple[str, object]


@dataclass
class _Walk:
    contents: Contents
    keys: Mapping[SiteName, VerifyKey]
    release: Digest
    #: The last round whose state the log has; None before the first state.
    committed: int | None = None
    published: bool = False
    released: bool = False
    statements: set[tuple[int, SiteName]] = field(default_factory=set)
    #: Approvals and keys as they stand, and those that stood at some time since the last state.
    approved: dict[SiteName, Digest] = field(default_factory=dict)
    recently_approved: dict[SiteName, Digest] = field(default_factory=dict)
    enrolled: dict[SiteName, VerifyKey] = field(default_factory=dict)
    recently_enrolled: dict[SiteName, set[VerifyKey]] = field(default_factory=dict)

    def take(self, leaf: AnyLeaf) -> Iterator[_Fault]:
        """One more leaf; what is wrong with it."""
        run, plan = self.contents.manifest.run, self.contents.manifest.plan
        match leaf:
            case SiteAdmitted():
                self._enrol(leaf.site, leaf.evidence_key)
            case KeyRotated():
                self._enrol(leaf.site, leaf.new_key)
            case SiteRevoked():
                self.enrolled.pop(leaf.site, None)
            case PlanPublished() if leaf.plan == plan:
                self.published = True
            case PlanApproved() if leaf.plan == plan:
                yield from self._approve(leaf)
            case PlanDecided() if leaf.plan == plan:
                self.approved.pop(leaf.site, None)
            case EncoderCommitted() if leaf.run == run:
                yield from self._commit(leaf)
            case StatementLogged() if leaf.run == run:
                yield from self._state(leaf)
            case Released() if leaf.run == run:
                yield from self._release(leaf)
            case _:
                pass

    def missing(self) -> Faults:
        """What should have been in the log and was not."""
        for index, site in sorted(self.contents.statements.keys() - self.statements):
            yield _fault("the log has no leaf of this statement", None, record.statement_path(index, site))
        if self.committed != self.contents.manifest.rounds:
            yield _fault("the log does not have all states", f"{self.committed} of {self.contents.manifest.rounds}", _LEAVES)
        if not self.released:
            yield _fault("the log has no leaf of this release", self.release, _LEAVES)

    def _enrol(self, site: SiteName, key: VerifyKey) -> None:
        self.enrolled[site] = key
        self.recently_enrolled.setdefault(site, set()).add(key)

    def _approve(self, leaf: PlanApproved) -> Iterator[_Fault]:
        if not self.published:
            yield "a plan was approved before it was published", leaf.site
        self.approved[leaf.site] = self.recently_approved[leaf.site] = leaf.approval

    def _commit(self, leaf: EncoderCommitted) -> Iterator[_Fault]:
        due = 0 if self.committed is None else self.committed + 1
        entry = self.contents.manifest.entry(record.state_path(leaf.round_index))
        if leaf.round_index != due:
            yield "a state out of order", f"round {leaf.round_index}, due {due}"
        if entry is None or entry.digest != leaf.state:
            yield "a state that is not the record's", f"round {leaf.round_index}, {leaf.state}"
        if self.released:
            yield "a state after the release", f"round {leaf.round_index}"
        self.committed = leaf.round_index
        self.recently_approved = dict(self.approved)
        self.recently_enrolled = {site: {key} for site, key in self.enrolled.items()}

    def _state(self, leaf: StatementLogged) -> Iterator[_Fault]:
        key, here = (leaf.round_index, leaf.site), f"round {leaf.round_index}, {leaf.site}"
        sealed = self.contents.statements.get(key)
        if sealed is None or sealed.envelope != leaf.statement:
            yield "a statement of this run that the record does not have", here
        if self.committed is None or leaf.round_index != self.committed + 1:
            yield "a statement that does not lie between the states of its round", here
        if key in self.statements:
            yield "a statement that the log has already", here
        approval = self.contents.manifest.entry(record.approval_path(leaf.site))
        if approval is None or self.recently_approved.get(leaf.site) != approval.digest:
            yield "a statement of a site that had not approved the plan by the recorded approval", here
        if self.keys.get(leaf.site) not in self.recently_enrolled.get(leaf.site, set()):
            yield "a statement signed with a key that was not the site's in the log", here
        self.statements.add(key)

    def _release(self, leaf: Released) -> Iterator[_Fault]:
        if leaf.release != self.release:
            return  # another release of the same run, such as one with an evaluation
        if self.committed != self.contents.manifest.rounds:
            yield "a release before the run's last state", f"round {self.committed} of {self.contents.manifest.rounds}"
        self.released = True


def _fault(what: str, value: object, where: str) -> ProvenanceError:
    return ProvenanceError(ErrorCode.LOG_DISAGREES, what, where=where, value=value)
