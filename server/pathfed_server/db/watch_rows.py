"""What those who watch runs read from the database in one go: plain values, every state a text."""

from collections.abc import Mapping
from dataclasses import dataclass

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_server.db.rows import PlanRow


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a site in a round, as far as it is known; times are UTC seconds.

    `code`: why not admitted, None otherwise. `rounding`: a bound on the L2 norm of what the wire format's rounding added to its update.
    """

    site: SiteName
    state: str
    code: str | None
    offered_at: float | None
    received_at: float | None
    rounding: float | None


@dataclass(frozen=True, kw_only=True)
class RoundFacts:
    """A round with its sites, in name order.

    Attributes:
        index: 1 for the first.
        state: where it stands.
        attempt: how often it has been offered.
        code: why its last attempt failed, or None.
        base_state: digest of the state it starts from.
        next_state: digest of the state it led to; None: not committed.
        offered_at: UTC seconds, as the two below; None: planned only.
        deadline: None: planned only.
        committed_at: None: not committed.
        outcomes: of its last attempt.
    """

    index: int
    state: str
    attempt: int
    code: str | None
    base_state: Digest
    next_state: Digest | None
    offered_at: float | None
    deadline: float | None
    committed_at: float | None
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run as one state of the database has it.

    Attributes:
        run: its name.
        state: where it stands.
        code: why it failed, or None.
        attempt: how often a loop has taken it up.
        failures: failed attempts at the next round since the last commit.
        planned_at: UTC seconds, as the two below.
        started_at: None: never taken up.
        ended_at: None: not ended.
        plan: its plan.
        committed: how many of its rounds count.
        rounds: those that there are, or the newest of them, in order.
        epsilon: what this plan has cost a patient of each site so far, as the site stated it last.
    """

    run: RunName
    state: str
    code: str | None
    attempt: int
    failures: int
    planned_at: float
    started_at: float | None
    ended_at: float | None
    plan: PlanRow
    committed: int
    rounds: tuple[RoundFacts, ...]
    epsilon: Mapping[SiteName, float]


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """A site as an operator looks for it.

    Attributes:
        site: its name.
        rounds: committed rounds that its updates counted in, over all runs.
        last_update_at: UTC seconds when its last reply was whole on our disk, or None.
        last_refusal: the event that tells of the last update refused, as number, UTC seconds and detail, or None.
    """

    site: SiteName
    rounds: int
    last_update_at: float | None
    last_refusal: tuple[int, float, Mapping[str, object]] | None
