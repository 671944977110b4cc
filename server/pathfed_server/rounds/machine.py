"""The states of runs and rounds, and which events lead from one to another: a frozen table. What is not in it is refused.

    run     planned -> running -> finished | failed
            running -> pausing -> paused      a round under way ends first; `pause --now` goes to paused at once
            running -> draining -> stopped    likewise; `stop` goes to stopped at once
            paused, stopped, failed -> planned    resumed
    round   planned -> offered -> training -> collecting -> admitted -> committed
            planned, collecting -> failed     too few updates
            any but committed -> planned      the round is begun again: same index, same base state

A round is *offered* once its offers are signed and noted, and *training* once the first of them is handed to the network: from then on a
site may have charged its ledger. Pure: the store applies the table in the transaction that writes what the event is about.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_server.rounds.state import RoundState, RunState


class RunEvent(StrEnum):
    """What can happen to a run."""

    TAKE_UP = "take_up"
    PAUSE = "pause"
    PAUSE_NOW = "pause_now"
    DRAIN = "drain"
    STOP = "stop"
    RESUME = "resume"
    REST = "rest"
    FINISH = "finish"
    FAIL = "fail"


class RoundEvent(StrEnum):
    """What can happen to a round."""

    OFFER = "offer"
    SEND = "send"
    DECIDE = "decide"
    ADMIT = "admit"
    COMMIT = "commit"
    FAIL = "fail"
    BEGIN_AGAIN = "begin_again"
    ABANDON = "abandon"


#: Runs that a loop may write to.
LIVE = frozenset({RunState.RUNNING, RunState.PAUSING, RunState.DRAINING})
#: Runs that a server keeps a loop going for.
OPEN = LIVE | {RunState.PLANNED}
#: Runs that wait for the end of a round under way: they begin no other.
ENDING = frozenset({RunState.PAUSING, RunState.DRAINING})
#: Rounds that have begun and are neither committed nor failed.
UNDER_WAY = frozenset({RoundState.PLANNED, RoundState.OFFERED, RoundState.TRAINING, RoundState.COLLECTING, RoundState.ADMITTED})

_P, _R, _PG, _PD, _DG = RunState.PLANNED, RunState.RUNNING, RunState.PAUSING, RunState.PAUSED, RunState.DRAINING
_FI, _FA, _ST = RunState.FINISHED, RunState.FAILED, RunState.STOPPED

#: To which state an event leads, by the state before. An event that finds its work done leads to the same state.
RUN_TABLE: Mapping[RunEvent, Mapping[RunState, RunState]] = MappingProxyType(
    {
        RunEvent.TAKE_UP: MappingProxyType({_P: _R, _R: _R, _PG: _PG, _DG: _DG}),
        RunEvent.PAUSE: MappingProxyType({_P: _PD, _R: _PG, _DG: _PG, _PG: _PG, _PD: _PD}),
        RunEvent.PAUSE_NOW: MappingProxyType({_P: _PD, _R: _PD, _DG: _PD, _PG: _PD, _PD: _PD}),
        RunEvent.DRAIN: MappingProxyType({_P: _ST, _R: _DG, _PG: _DG, _DG: _DG, _PD: _ST, _ST: _ST}),
        RunEvent.STOP: MappingProxyType({_P: _ST, _R: _ST, _PG: _ST, _DG: _ST, _PD: _ST, _ST: _ST}),
        RunEvent.RESUME: MappingProxyType({_P: _P, _R: _R, _PG: _R, _DG: _R, _PD: _P, _ST: _P, _FA: _P}),
        RunEvent.REST: MappingProxyType({_PG: _PD, _DG: _ST}),
        RunEvent.FINISH: MappingProxyType({_R: _FI, _PG: _FI, _DG: _FI}),
        RunEvent.FAIL: MappingProxyType({_P: _FA, _R: _FA, _PG: _FA, _DG: _FA}),
    }
)

_BEFORE_COMMIT = (*sorted(UNDER_WAY), RoundState.FAILED)

ROUND_TABLE: Mapping[RoundEvent, Mapping[RoundState, RoundState]] = MappingProxyType(
    {
        RoundEvent.OFFER: MappingProxyType({RoundState.PLANNED: RoundState.OFFERED}),
        RoundEvent.SEND: MappingProxyType({RoundState.OFFERED: RoundState.TRAINING}),
        # Offered: all answers were kept from an attempt before, or nothing may be sent any more.
        RoundEvent.DECIDE: MappingProxyType(dict.fromkeys((RoundState.OFFERED, RoundState.TRAINING), RoundState.COLLECTING)),
        RoundEvent.ADMIT: MappingProxyType({RoundState.COLLECTING: RoundState.ADMITTED}),
        RoundEvent.COMMIT: MappingProxyType({RoundState.ADMITTED: RoundState.COMMITTED}),
        # Planned: so few sites may take part that none is asked.
        RoundEvent.FAIL: MappingProxyType(dict.fromkeys((RoundState.PLANNED, RoundState.COLLECTING), RoundState.FAILED)),
        RoundEvent.BEGIN_AGAIN: MappingProxyType(dict.fromkeys(_BEFORE_COMMIT, RoundState.PLANNED)),
        RoundEvent.ABANDON: MappingProxyType(dict.fromkeys(sorted(UNDER_WAY), RoundState.PLANNED)),
    }
)


@dataclass(frozen=True, kw_only=True)
class Transition:
    """A state, what happened, and the state it led to; `before` is None for a round that has just been made."""

    event: str
    before: str | None
    after: str

    @property
    def changes(self) -> bool:
        """Whether anything happened at all: an order given twice changes nothing the second time."""
        return self.before != self.after

    def plain(self) -> dict[str, str | None]:
        """The transition as the audit trail keeps it."""
        return {"event": self.event, "from": self.before, "to": self.after}


def move_run(before: RunState, event: RunEvent, *, where: str) -> Transition:
    """What an event does to a run.

    Raises:
        RoundError: PF511, it can do nothing to a run in this state.
    """
    after = RUN_TABLE[event].get(before)
    if after is None:
        verb = event.value.replace("_", " ")
        allowed = ", ".join(RUN_TABLE[event])
        raise RoundError(
            ErrorCode.RUN_STATE,
            f"a {before} run cannot {_TOLD.get(event, verb)}",
            where=where,
            remedy=f"only a run that is one of: {allowed}",
        )
    return Transition(event=event, before=before, after=after)


def move_round(before: RoundState, event: RoundEvent, *, where: str) -> Transition:
    """What an event does to a round.

    Raises:
        RoundError: PF560, it can do nothing to a round in this state.
    """
    after = ROUND_TABLE[event].get(before)
    if after is None:
        raise RoundError(ErrorCode.ROUND_STATE, f"{event.value.replace('_', ' ')} can do nothing to a {before} round", where=where)
    return Transition(event=event, before=before, after=after)


_TOLD = {
    RunEvent.TAKE_UP: "be taken up",
    RunEvent.PAUSE: "be paused",
    RunEvent.PAUSE_NOW: "be paused",
    RunEvent.DRAIN: "be drained",
    RunEvent.STOP: "be stopped",
    RunEvent.RESUME: "be resumed",
    RunEvent.REST: "rest",
    RunEvent.FINISH: "finish",
    RunEvent.FAIL: "fail",
}
