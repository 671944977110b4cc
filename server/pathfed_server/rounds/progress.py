"""What a running loop tells whoever watches it, and how it ends."""

from dataclasses import dataclass
from enum import StrEnum

from pathfed_common.ids import RunName, SiteName
from pathfed_server.rounds.state import Checkpoint, RunState


class Stage(StrEnum):
    """Where in a round the loop is."""

    OPENED = "opened"
    DECIDED = "decided"
    COLLECTED = "collected"
    AVERAGED = "averaged"
    STEPPED = "stepped"
    RECORDED = "recorded"
    COMMITTED = "committed"
    CLEANED = "cleaned"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One thing that has just happened, for whoever watches.

    Attributes:
        run: the run.
        round_index: the round; 0 for the initial state.
        rounds: how many the plan has.
        stage: what has happened.
        site: the site whose outcome is decided (`Stage.DECIDED` only).
        outcome: its state, or for a failed round what became of each site.
        code: its code, where there is one.
    """

    run: RunName
    round_index: int
    rounds: int
    stage: Stage
    site: SiteName | None = None
    outcome: str | None = None
    code: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How a loop ended.

    Attributes:
        state: finished, paused or stopped.
        last: the last committed checkpoint, or None when a run was stopped before its initial state.
    """

    state: RunState
    last: Checkpoint | None
