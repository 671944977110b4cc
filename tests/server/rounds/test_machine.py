"""The tables of runs and rounds: what they allow, that nothing else passes, and that every walk through them ends where it should."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_server.rounds import machine
from pathfed_server.rounds.machine import ROUND_TABLE, RUN_TABLE, RoundEvent, RunEvent, Transition, move_round, move_run
from pathfed_server.rounds.state import RoundState, RunState

HERE = "run-1"


def test_every_event_is_in_its_table_and_every_state_can_be_reached() -> None:
    assert set(RUN_TABLE) == set(RunEvent)
    assert set(ROUND_TABLE) == set(RoundEvent)
    assert {after for row in RUN_TABLE.values() for after in row.values()} == set(RunState)
    assert {after for row in ROUND_TABLE.values() for after in row.values()} == set(RoundState)


def test_tables_cannot_be_changed() -> None:
    for table in (RUN_TABLE, ROUND_TABLE, *RUN_TABLE.values(), *ROUND_TABLE.values()):
        with pytest.raises(TypeError):
            table["planned"] = RunState.FINISHED  # type: ignore[index]


@pytest.mark.parametrize("event", RunEvent)
@pytest.mark.parametrize("before", RunState)
def test_run_takes_the_tables_events_and_no_other(before: RunState, event: RunEvent) -> None:
    if before in RUN_TABLE[event]:
        assert move_run(before, event, where=HERE) == Transition(event=event, before=before, after=RUN_TABLE[event][before])
    else:
        with pytest.raises(RoundError, match=f"a {before} run cannot") as caught:
            move_run(before, event, where=HERE)
        assert (caught.value.code, caught.value.where) == (ErrorCode.RUN_STATE, HERE)


@pytest.mark.parametrize("event", RoundEvent)
@pytest.mark.parametrize("before", RoundState)
def test_round_takes_the_tables_events_and_no_other(before: RoundState, event: RoundEvent) -> None:
    if before in ROUND_TABLE[event]:
        assert move_round(before, event, where=HERE) == Transition(event=event, before=before, after=ROUND_TABLE[event][before])
    else:
        with pytest.raises(RoundError) as caught:
            move_round(before, event, where=HERE)
        assert caught.value.code is ErrorCode.ROUND_STATE


def test_nothing_happens_to_what_is_over() -> None:
    assert not any(RoundState.COMMITTED in row for row in ROUND_TABLE.values())
    assert not any(RunState.FINISHED in row for row in RUN_TABLE.values())


def test_a_round_is_committed_only_from_admitted_and_admitted_only_from_collecting() -> None:
    ways = {
        after: {(event, before) for event, row in ROUND_TABLE.items() for before, to in row.items() if to is after} for after in RoundState
    }
    assert ways[RoundState.COMMITTED] == {(RoundEvent.COMMIT, RoundState.ADMITTED)}
    assert ways[RoundState.ADMITTED] == {(RoundEvent.ADMIT, RoundState.COLLECTING)}


class Walk(RuleBasedStateMachine):
    """Any events in any order, to a run and its round."""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.round = RunState.PLANNED, RoundState.PLANNED
        self.path = [self.round]

    @rule(event=st.sampled_from(RunEvent))
    def to_the_run(self, event: RunEvent) -> None:
        before = self.run
        try:
            moved = move_run(before, event, where=HERE)
        except RoundError:
            return
        self.run = RunState(moved.after)
        again = RUN_TABLE[event].get(self.run)
        if event in (RunEvent.PAUSE, RunEvent.PAUSE_NOW, RunEvent.STOP, RunEvent.RESUME):
            assert again is self.run or (event is RunEvent.PAUSE and again is RunState.PAUSING), "the same order again changes nothing"

    @rule(event=st.sampled_from(RoundEvent))
    def to_the_round(self, event: RoundEvent) -> None:
        try:
            self.round = RoundState(move_round(self.round, event, where=HERE).after)
        except RoundError:
            return
        self.path.append(self.round)

    @invariant()
    def commits_come_after_all_that_leads_to_them(self) -> None:
        if self.round is RoundState.COMMITTED:
            since = len(self.path) - 1 - self.path[::-1].index(RoundState.PLANNED)
            assert RoundState.OFFERED in self.path[since:]
            assert self.path[-3:] == [RoundState.COLLECTING, RoundState.ADMITTED, RoundState.COMMITTED]
            assert self.path.count(RoundState.COMMITTED) == 1

    @invariant()
    def what_a_loop_writes_to_is_kept_going(self) -> None:
        assert machine.LIVE < machine.OPEN
        assert (self.run in machine.OPEN) == (self.run in RUN_TABLE[RunEvent.TAKE_UP])
        assert (self.run in machine.LIVE) == (self.run in RUN_TABLE[RunEvent.FINISH])


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
