"""Many events in one message of bounded size: the first ones singly, and all of them in groups. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pathfed_server.notifying.kinds import Notice

#: Events that a message holds singly.
SINGLY = 50
#: Groups that a message holds; a run has few kinds and codes, so more of them are many runs at once.
GROUPS = 100
#: Sites that a group names.
SITES = 20

_Key = tuple[str, str | None, str | None]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Events of one kind, run and code.

    Attributes:
        kind: one of `kinds.KINDS`.
        run: the run, or None.
        code: the code, or None.
        count: how many events.
        first_id: number of the first.
        last_id: number of the last.
        first_at: UTC seconds.
        last_at: UTC seconds.
        first_round: the smallest round, or None.
        last_round: the greatest round, or None.
        sites: the first `SITES` sites, in order of their first event.
        more_sites: whether there are more of them.
    """

    kind: str
    run: str | None
    code: str | None
    count: int
    first_id: int
    last_id: int
    first_at: float
    last_at: float
    first_round: int | None
    last_round: int | None
    sites: tuple[str, ...]
    more_sites: bool


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one receiver is told at once.

    Attributes:
        id: names the message, also when it is sent again: ``<receiver>-<first event>-<last event>``.
        consortium: who tells.
        count: how many events it tells of.
        notices: the first `SINGLY` of them.
        groups: all of them, in groups; `GROUPS` at most.
        test: whether it was sent to try the receiver.
    """

    id: str
    consortium: str
    count: int
    notices: tuple[Notice, ...]
    groups: tuple[Group, ...]
    test: bool = False

    @property
    def counts(self) -> Mapping[str, int]:
        """How many events of each kind its groups hold, in order."""
        found: dict[str, int] = {}
        for group in self.groups:
            found[group.kind] = found.get(group.kind, 0) + group.count
        return found


@dataclass
class _Tally:
    first: Notice
    last: Notice
    count: int = 0
    rounds: tuple[int, int] | None = None
    sites: dict[str, None] = field(default_factory=dict)
    more: bool = False

    def add(self, notice: Notice) -> None:
        self.last, self.count = notice, self.count + 1
        if notice.round is not None:
            low, high = self.rounds or (notice.round, notice.round)
            self.rounds = (min(low, notice.round), max(high, notice.round))
        if notice.site is not None and notice.site not in self.sites:
            if len(self.sites) < SITES:
                self.sites[notice.site] = None
            else:
                self.more = True


class Collector:
    """Takes notices one by one, in order, and makes a message of them; its memory is bounded too."""

    def __init__(self) -> None:
        self._tallies: dict[_Key, _Tally] = {}
        self._notices: list[Notice] = []
        self._last = 0
        #: How many notices it has taken.
        self.count = 0

    def add(self, notice: Notice) -> None:
        """Take a notice."""
        self.count += 1
        self._last = notice.id
        if len(self._notices) < SINGLY:
            self._notices.append(notice)
        key = (notice.kind, notice.run, notice.code)
        if key in self._tallies or len(self._tallies) < GROUPS:
            self._tallies.setdefault(key, _Tally(notice, notice)).add(notice)

    def message(self, receiver: str, consortium: str) -> Message:
        """The message; at least one notice was taken."""
        return Message(
            id=f"{receiver}-{self._notices[0].id}-{self._last}",
            consortium=consortium,
            count=self.count,
            notices=tuple(self._notices),
            groups=tuple(_group(key, tally) for key, tally in self._tallies.items()),
        )


def _group(key: _Key, tally: _Tally) -> Group:
    kind, run, code = key
    low, high = tally.rounds or (None, None)
    return Group(
        kind=kind,
        run=run,
        code=code,
        count=tally.count,
        first_id=tally.first.id,
        last_id=tally.last.id,
        first_at=tally.first.at,
        last_at=tally.last.at,
        first_round=low,
        last_round=high,
        sites=tuple(tally.sites),
        more_sites=tally.more,
    )


def trial_message(receiver: str, consortium: str, *, at: float) -> Message:
    """A message that tries a receiver and tells of nothing."""
    return Message(id=f"{receiver}-test-{at:.0f}", consortium=consortium, count=0, notices=(), groups=(), test=True)
