"""Where a run stands, computed from what the database holds: for `pathfed-server run status RUN`. Pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pathfed_common.error_catalog import CATALOG
from pathfed_server.db.rows import AuditRow
from pathfed_server.db.watch_rows import Outcome, RoundFacts, RunFacts
from pathfed_server.rounds.state import RunState
from pathfed_server.watching.event_lines import facts_of, known_code

#: Rounds that the pace is measured over, the newest ones.
PACE_ROUNDS = 20
#: Kinds of events that are troubles of a run.
TROUBLE = ("round.failed", "run.failed")
#: States that a run does not leave by itself.
ENDED = (RunState.FINISHED, RunState.FAILED, RunState.STOPPED)


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Something that failed. `do` is what helps, as the error's page says; `round` is None for the run itself."""

    id: int
    at: float
    kind: str
    round: int | None
    code: str | None
    do: str | None


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Where a run stands.

    Attributes:
        run: its name.
        plan: digest of its plan.
        plan_name: the plan's name.
        state: its state.
        code: why it failed, or None.
        attempt: how often a loop has taken it up.
        failures: failed attempts at the present round.
        committed: rounds that count.
        planned: rounds of the plan.
        round: the present or last round, or None before the first.
        last_commit_at: UTC seconds, or None.
        round_s: what a round takes, seconds: the median from commit to commit over the last rounds, or None before the first.
        ends_at: when it ends at that pace, UTC seconds; None: it does not go on, or no pace is known.
        epsilon: the least and the most that the plan has cost a patient so far, over the sites, as they stated it; None: nothing stated.
        epsilon_limit: what the plan may cost.
        delta: at which epsilon is stated.
        troubles: what failed last, the newest first.
    """

    run: str
    plan: str
    plan_name: str
    state: str
    code: str | None
    attempt: int
    failures: int
    committed: int
    planned: int
    round: RoundFacts | None
    last_commit_at: float | None
    round_s: float | None
    ends_at: float | None
    epsilon: tuple[float, float] | None
    epsilon_limit: float
    delta: float
    troubles: tuple[Trouble, ...]


def view_of(facts: RunFacts, troubles: Sequence[AuditRow], *, now: float) -> RunView:
    """Where the run of `facts` stands at `now`, UTC seconds. `facts` has at least its last `PACE_ROUNDS` + 1 rounds."""
    plan = facts.plan.plan()
    commits = [each.committed_at for each in facts.rounds if each.committed_at is not None]
    pace = _pace(facts.rounds)
    left = plan.rounds.count - facts.committed
    goes_on = facts.state in (RunState.PLANNED, RunState.RUNNING)
    return RunView(
        run=facts.run,
        plan=plan.digest,
        plan_name=plan.name,
        state=facts.state,
        code=facts.code,
        attempt=facts.attempt,
        failures=facts.failures,
        committed=facts.committed,
        planned=plan.rounds.count,
        round=facts.rounds[-1] if facts.rounds else None,
        last_commit_at=commits[-1] if commits else None,
        round_s=pace,
        ends_at=_end(commits[-1], pace, left, now) if goes_on and left and commits and pace is not None else None,
        epsilon=(min(facts.epsilon.values()), max(facts.epsilon.values())) if facts.epsilon else None,
        epsilon_limit=plan.privacy.epsilon_limit,
        delta=plan.privacy.delta,
        troubles=tuple(_trouble(row) for row in troubles),
    )


def round_seconds(rounds: Sequence[RoundFacts]) -> dict[int, float]:
    """What each committed round took, seconds, by its number: since the commit before it, or since its offer where none is known."""
    took: dict[int, float] = {}
    before: float | None = None
    for each in rounds:
        if each.committed_at is not None:
            start = each.offered_at if before is None else before
            if start is not None:
                took[each.index] = max(0.0, each.committed_at - start)
            before = each.committed_at
    return took


def _pace(rounds: Sequence[RoundFacts]) -> float | None:
    took = list(round_seconds(rounds).values())[-PACE_ROUNDS:]
    return statistics.median(took) if took else None


def _end(last: float, pace: float, left: int, now: float) -> float:
    """The present round ends when its time is over, or now where that has passed."""
    return max(now, last + pace) + pace * (left - 1)


def _trouble(row: AuditRow) -> Trouble:
    facts = facts_of(row)
    known = known_code(facts.code) if facts.code else None
    return Trouble(
        id=facts.id,
        at=facts.at,
        kind=facts.kind,
        round=facts.round,
        code=facts.code,
        do=CATALOG[known].remedy if known is not None else None,
    )


def for_scripts(view: RunView) -> dict[str, Any]:
    """A view as `--json` prints it."""
    low, high = view.epsilon or (None, None)
    told: dict[str, Any] = {**vars(view), "round": None if view.round is None else round_for_scripts(view.round)}
    told["troubles"] = [vars(each) for each in view.troubles]
    told["epsilon"] = {"least": low, "most": high}
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in told.items()}


def round_for_scripts(facts: RoundFacts) -> dict[str, Any]:
    """A round with its sites as `--json` prints it."""
    told = {**vars(facts), "round": facts.index, "sites": {each.site: _outcome(each) for each in facts.outcomes}}
    del told["index"], told["outcomes"]
    return told


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {key: value for key, value in vars(outcome).items() if key != "site"}
