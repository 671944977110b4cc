"""The real loop against faults in any order: what must hold after each, and at the end.

Each step begins or goes on with the run under one fault: sites that are silent, late, hostile, or send twice; a kill at any instant; a
database that goes away; orders to pause, stop, drain and resume; sites that join and leave; refused updates that are released. The run is
small (three rounds, three sites, tensors of a few numbers), and everything but the sites' network is real.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.server.rounds.consortium import (
    NAMES,
    RUN,
    SHAPES,
    Answer,
    Conduct,
    Consortium,
    found,
    honest_update,
    initial_state,
    make_plan,
    send,
)
from tests.server.rounds.test_kill import Fuse, Killed, drive_until
from tests.server.rounds.test_standing import late, over_budget, silent, too_long, with_nan
from torch import Tensor

from pathfed_common import digest
from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.ids import SiteName
from pathfed_common.protocol.messages import RoundOffer
from pathfed_server.db.rounds_store import RoundsStore
from pathfed_server.db.rows import RoundRow
from pathfed_server.rounds.machine import OPEN, ROUND_TABLE, RUN_TABLE, RoundEvent, RunEvent
from pathfed_server.rounds.ports import Reply
from pathfed_server.rounds.refusals import RELEASABLE
from pathfed_server.rounds.state import ParticipationState, RoundState, RunState

ROUNDS, QUORUM = 3, 2


def twice(answer: Answer, folder: Path, at: float) -> list[Reply]:
    first = answer.reply(folder, at)
    assert first.update is not None
    kept = first.update.rename(folder / f"{answer.offer.site}.first")
    return [replace(first, update=kept), answer.reply(folder, at)]


def another_round(answer: Answer, folder: Path, at: float) -> list[Reply]:
    stale = replace(answer, statement=replace(answer.statement, round_index=answer.offer.round_index + 1))
    return [stale.reply(folder, at)]


HONEST: tuple[Conduct, ...] = (send, twice)
CONDUCT = st.sampled_from([*HONEST, silent, late, over_budget, too_long, with_nan, another_round])
SITES = st.sampled_from(NAMES)


@contextmanager
def refused_for(*codes: ErrorCode) -> Iterator[None]:
    """What is inside may be refused, with one of these codes and no other."""
    try:
        yield
    except RoundError as error:
        if error.code not in codes:
            raise


class Survives(RuleBasedStateMachine):
    """One run, until it is finished or the steps are over."""

    migrated: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(mkdtemp(prefix="pathfed-survives-"))
        self.made: Consortium
        self.counted: dict[int, dict[SiteName, dict[str, Tensor]]] = {}

    @initialize(late_counts=st.booleans(), enough=st.sampled_from([0, 2]), ask_at_most=st.sampled_from([0, 2]))
    def planned(self, late_counts: bool, enough: int, ask_at_most: int) -> None:
        torch.set_num_threads(1)
        shutil.copyfile(self.migrated, self.home / "server.db")
        plan = make_plan(rounds=ROUNDS, quorum=QUORUM, optimiser="sgd")
        keys = {"late": "same_base" if late_counts else "discard", "enough": enough, "ask_at_most": ask_at_most}
        self.made = found(self.home, plan.model_copy(update={"rounds": plan.rounds.model_copy(update=keys)}), NAMES)

    # ---- what can happen

    @rule(site=SITES, conduct=CONDUCT)
    def site_behaves(self, site: SiteName, conduct: Conduct) -> None:
        self.made.sites.conduct[site] = conduct

    @precondition(lambda self: self.open)
    @rule()
    def loop_runs(self) -> None:
        self._drive()

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 70))
    def loop_is_killed(self, at: int) -> None:
        with suppress(Killed, RoundError):
            drive_until(self.made, Fuse(at))

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 25))
    def database_goes_away(self, at: int) -> None:
        left = [at]

        def gone(_: RoundsStore, real: Callable[[], Any]) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise RoundError(ErrorCode.DATABASE_UNAVAILABLE, "the database is away")
            return real()

        real_write = RoundsStore._write
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RoundsStore, "_write", lambda store: gone(store, lambda: real_write(store)))
            self._drive()

    @precondition(lambda self: self.open)
    @rule(order=st.sampled_from(["pause", "pause now", "drain", "stop"]), during=st.integers(0, 40))
    def operator_orders(self, order: str, during: int) -> None:
        """An order in the middle of a run: at the n-th instant that the loop tells of, or before it begins."""
        left = [during]

        def watch(_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                self._order(order)

        if during == 0:
            self._order(order)
        self.made.told = type("Watch", (list,), {"append": lambda _, told: watch(told)})()
        self._drive()
        self.made.told = []

    @rule()
    def operator_resumes(self) -> None:
        with refused_for(*([ErrorCode.RUN_STATE] if self.state is RunState.FINISHED else [])):
            self.made.store.reopen_run(RUN, at=self.made.clock.now())

    @rule(site=SITES, add=st.booleans())
    def site_joins_or_leaves(self, site: SiteName, add: bool) -> None:
        joining, leaving = ([site], []) if add else ([], [site])
        with refused_for(ErrorCode.QUORUM_LOST, ErrorCode.RUN_STATE):
            self.made.store.change_run_sites(RUN, add=joining, remove=leaving, quorum=QUORUM, at=self.made.clock.now())

    @rule()
    def operator_releases(self) -> None:
        for row in self.made.store.quarantine(RUN):
            with refused_for(ErrorCode.RELEASE_REFUSED):
                self.made.store.release_quarantined(row.number, reason="test", at=self.made.clock.now())
                assert row.aside.code in RELEASABLE

    @rule(site=SITES)
    def operator_reinstates(self, site: SiteName) -> None:
        self.made.store.reinstate_site(site, at=self.made.clock.now())

    # ---- what must hold

    @property
    def state(self) -> RunState:
        return self.made.store.run(RUN).state

    @property
    def open(self) -> bool:
        return self.state in OPEN

    @invariant()
    def rounds_are_committed_in_order_once_each(self) -> None:
        checkpoints, rows = self.made.store.checkpoints(RUN), self.made.store.rounds(RUN)
        assert [each.round_index for each in checkpoints] == list(range(len(checkpoints)))
        committed = [row.round_index for row in rows if row.state is RoundState.COMMITTED]
        assert committed == list(range(1, len(committed) + 1))
        assert len(committed) == max(0, len(checkpoints) - 1)
        assert len(rows) <= len(committed) + 1, "no round begins before the one before it counts"
        assert [row.base_state for row in rows] == [each.state for each in checkpoints[: len(rows)]]

    @invariant()
    def every_transition_is_legal_and_recorded(self) -> None:
        run: str = RunState.PLANNED
        rounds: dict[int, str | None] = {}
        for event in self.made.store.audit_events():
            detail = event.detail
            if event.subject != RUN or "to" not in detail:
                continue
            if event.action.startswith("run."):
                assert detail["from"] == run
                assert RUN_TABLE[RunEvent(detail["event"])][RunState(run)] == detail["to"]
                run = detail["to"]
                continue
            before = rounds.get(detail["round"])
            assert detail["from"] == before
            if before is None:
                assert (detail["event"], detail["to"]) == ("plan", RoundState.PLANNED)
            else:
                assert ROUND_TABLE[RoundEvent(detail["event"])][RoundState(before)] == detail["to"]
            rounds[detail["round"]] = detail["to"]
        assert run == self.state
        assert rounds == {row.round_index: row.state for row in self.made.store.rounds(RUN)}

    @invariant()
    def what_counts_is_the_honest_update_or_one_that_an_operator_released(self) -> None:
        self.counted = {}
        for row in self.made.store.rounds(RUN):
            if row.state is RoundState.COMMITTED:
                self.counted[row.round_index] = self._admitted(row)
        stated = [(row.round_index, row.site) for row in self.made.store.statements(RUN)]
        assert stated == [(index, site) for index, sites in sorted(self.counted.items()) for site in sorted(sites)], "each once"

    def _admitted(self, row: RoundRow) -> dict[SiteName, dict[str, Tensor]]:
        counted = {}
        for one in self.made.store.participations(RUN, row.round_index):
            if one.state is not ParticipationState.ADMITTED:
                continue
            update = honest_update(self.made.plan, self._offer(one.site, row))
            if one.released == ErrorCode.UPDATE_NORM:
                update = {name: tensor * 10 for name, tensor in update.items()}
            assert one.released in (None, *RELEASABLE)
            assert one.update == digest.of_bytes(weights.dump(update, {"kind": "pathfed-update"}))
            counted[one.site] = update
        assert len(counted) >= QUORUM
        return counted

    def _offer(self, site: SiteName, row: RoundRow) -> RoundOffer:
        return RoundOffer(
            run=RUN,
            site=site,
            round_index=row.round_index,
            plan=self.made.plan.digest,
            base_state=row.base_state,
            base_state_bytes=1,
            offered_at=1.0,
            deadline=2.0,
        )

    def teardown(self) -> None:
        try:
            self._states_are_those_of_an_undisturbed_run()
        finally:
            self.made.store.close()
            shutil.rmtree(self.home, ignore_errors=True)

    def _states_are_those_of_an_undisturbed_run(self) -> None:
        """Computed the plain way from what counted in each round: descend the mean, with momentum."""
        optimiser = self.made.plan.server_optimiser
        state = initial_state()
        velocity = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for checkpoint in self.made.store.checkpoints(RUN):
            for name in SHAPES if checkpoint.round_index else ():
                updates = [sent[name].double() for _, sent in sorted(self.counted[checkpoint.round_index].items())]
                mean = torch.stack(updates).sum(dim=0).div(len(updates)).float()
                velocity[name] = (velocity[name].double() * optimiser.momentum + mean.double()).float()
                state[name] = (state[name].double() - optimiser.learning_rate * velocity[name].double()).float()
            held = weights.load((self.home / checkpoint.state_path).read_bytes())
            assert all(torch.equal(held[name], state[name]) for name in SHAPES), f"after round {checkpoint.round_index}"

    def _drive(self) -> None:
        with refused_for(ErrorCode.QUORUM_LOST, ErrorCode.RUN_STATE, ErrorCode.DATABASE_UNAVAILABLE):
            self.made.drive()

    def _order(self, order: str) -> None:
        store, at = self.made.store, self.made.clock.now()
        with refused_for(ErrorCode.RUN_STATE):
            if order == "drain":
                store.drain_run(RUN, at=at)
            elif order == "stop":
                store.stop_run(RUN, at=at)
            else:
                store.pause_run(RUN, now=order == "pause now", at=at)


@pytest.fixture(autouse=True)
def _migrated(migrated_file: Path) -> None:
    Survives.migrated = migrated_file


TestSurvives = Survives.TestCase
TestSurvives.settings = settings(
    max_examples=10,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
