"""The loop that drives a run, round after round, from wherever it was left.

    choose participants -> open the round -> offers -> replies, each admitted or refused as it arrives -> quorum
    -> weighted mean -> server step -> record -> commit -> clean up

Guarantees:
    - **Killed at any instant, it goes on from the last committed round** and ends with the same states, bit for bit, as an undisturbed run
      in which the same sites took part. Files are written whole under names that only a commit makes count; the commit is one transaction;
      cleaning up is repeated at the next start. Updates admitted before the kill are admitted again from the spool, and sites asked again
      send the bytes they have sealed.
    - A site that is late, silent, dishonest or broken costs the round its update and nothing else.
    - A round without a quorum leaves no state, is told in the database, and is offered again with the same index and base state; after
      `attempts` failures the run has failed. Where fewer sites than the quorum may take part at all, none is asked, so none is charged.
    - Only one loop can write: a loop that another has superseded, or whose run was stopped or paused at once, ends at its next word to the
      store. A run that is to pause or stop after its round ends it, and begins no other.
    - Every state of run and round, and what leads from one to another, is in `machine`; the store notes each transition.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pathfed_common.encoder import weights as tensor_files
from pathfed_common.errors import ErrorCode, RoundError
from pathfed_common.files import write_atomic
from pathfed_common.ids import SiteName
from pathfed_common.model import trained
from pathfed_common.part_file import file_digest
from pathfed_server.rounds.aggregation import aggregate, shares
from pathfed_server.rounds.collection import Collection, reasons
from pathfed_server.rounds.files import RunFiles
from pathfed_server.rounds.gathering import Gathering
from pathfed_server.rounds.machine import ENDING
from pathfed_server.rounds.ports import Clock, RoundStore, RunRecorder, SitePort
from pathfed_server.rounds.progress import Progress, RunOutcome, Stage
from pathfed_server.rounds.released import average_digest
from pathfed_server.rounds.server_step import step, write_initial_optimiser
from pathfed_server.rounds.settings import RunSettings
from pathfed_server.rounds.state import Checkpoint, Participation, RoundResult, RoundTimes, RunState
from pathfed_server.rounds.teacher import share_kept


def run_rounds(
    settings: RunSettings,
    *,
    sites: SitePort,
    store: RoundStore,
    recorder: RunRecorder,
    clock: Clock,
    progress: Callable[[Progress], None] = lambda _: None,
) -> RunOutcome:
    """Drive a run to its end.

    Returns:
        How it ended: finished, or paused or stopped by the operator.

    Raises:
        RoundError: PF503, a round lost its quorum too often; PF514, a checkpoint's file is gone or the server step has no finite result;
            PF510, PF511, the run is not there, has another plan, or has been taken up by another loop; PF512, the database.
        HostError: the disk is full (PF901) or the home cannot be written (PF904).
    """
    return _Loop(settings, sites, store, recorder, clock, progress).drive()


@dataclass
class _Loop:
    settings: RunSettings
    sites: SitePort
    store: RoundStore
    recorder: RunRecorder
    clock: Clock
    progress: Callable[[Progress], None]
    attempt: int = 0
    last: Checkpoint | None = None

    def __post_init__(self) -> None:
        self.run, self.plan = self.settings.run, self.settings.plan
        self.plan_digest, self.trained = self.plan.digest, trained(self.plan)
        self.files = RunFiles(self.settings.home, self.run)

    def drive(self) -> RunOutcome:
        try:
            last = self._all_rounds()
        except RoundError as error:
            ended = self._ended() if error.code is ErrorCode.RUN_STATE else None
            if ended is not None:
                return RunOutcome(state=ended, last=self.last)
            if error.code in (ErrorCode.QUORUM_LOST, ErrorCode.RUN_FAILED):
                # A run that cannot go on is failed where the operator looks, not only in a log.
                self.store.fail_run(self.run, self.attempt, code=error.code.value, at=self.clock.now())
            raise
        return RunOutcome(state=RunState.FINISHED, last=last)

    def _ended(self) -> RunState | None:
        """As what the operator has ended this loop, or None; a run that was only to end its round rests now."""
        state = self.store.progress(self.run).state
        if state in ENDING:
            return self.store.rest_run(self.run, self.attempt, at=self.clock.now())
        return state if state in (RunState.STOPPED, RunState.PAUSED) else None

    def _all_rounds(self) -> Checkpoint:
        begun = self.store.begin_attempt(self.run, at=self.clock.now())
        self.attempt = begun.attempt
        if begun.plan != self.plan_digest:
            raise RoundError(ErrorCode.RUN_STATE, "the run has another plan", where=self.run, value=begun.plan)
        self.last = last = self._initial() if begun.last is None else self._checked(begun.last)
        self.files.sweep(last.round_index)
        while last.round_index < self.plan.rounds.count:
            self.last = last = self._round(last)
        state, optimiser = self.settings.home / last.state_path, self.settings.home / last.optimiser_path
        self.recorder.finish(run=self.run, rounds=last.round_index, state=state, state_digest=last.state, optimiser=optimiser)
        self.store.finish_run(self.run, self.attempt, at=self.clock.now())
        return last

    def _initial(self) -> Checkpoint:
        self.files.prepare(0)
        tensors = self.settings.initial_state()
        layout = {name: (torch.float32, shape) for name, shape in self.settings.shapes.items()}
        write_atomic(self.files.state(0), tensor_files.chunks(layout, tensors.__getitem__, {}))
        write_initial_optimiser(self.plan.server_optimiser, self.files.state(0), self.files.optimiser(0), trained=self.trained)
        first = self._checkpoint(0)
        candidates = self.store.candidates(self.run)
        self.recorder.begin(run=self.run, plan=self.plan, candidates=candidates, initial_state=self.files.state(0))
        self._tell(Stage.RECORDED, 0)
        self.store.commit_initial(self.run, self.attempt, first, at=self.clock.now())
        self._tell(Stage.COMMITTED, 0)
        return first

    def _round(self, last: Checkpoint) -> Checkpoint:
        """Offer the next round until it counts."""
        while True:
            gathered, exchange_s = self._gather(last)
            if len(gathered.admitted) >= self.plan.rounds.quorum:
                return self._commit(last, gathered, exchange_s)
            rows, index, lost = gathered.participations, last.round_index + 1, ErrorCode.QUORUM_LOST
            failures = self.store.fail_round(self.run, self.attempt, index, rows, code=lost.value, at=self.clock.now())
            self._tell(Stage.FAILED, index, outcome=reasons(rows), code=lost.value)
            if failures >= self.settings.attempts:
                wanted = f"{len(gathered.admitted)} of {self.plan.rounds.quorum} updates, {failures} times; {reasons(rows)}"
                remedy = "bring the sites back, reopen the run and start it again"
                raise RoundError(
                    lost, "too few updates for the round to count", where=f"{self.run}, round {index}", value=wanted, remedy=remedy
                )
            self.clock.sleep(self.settings.retry_pause_s)

    def _gather(self, last: Checkpoint) -> tuple[Collection, float]:
        """One attempt at the round after `last`: everything up to the last reply, and how many seconds that took."""
        index = last.round_index + 1

        def told(stage: Stage, row: Participation | None) -> None:
            if row is None:
                self._tell(stage, index)
            else:
                self._tell(stage, index, site=row.site, outcome=row.state.value, code=row.code)

        return Gathering(self.settings, self.sites, self.store, self.clock, self.attempt, last, told).run()

    def _commit(self, last: Checkpoint, gathered: Collection, exchange_s: float) -> Checkpoint:
        index = last.round_index + 1
        updates = {site: path for site, (path, _) in gathered.admitted.items()}
        statements = {site: verdict.envelope for site, (_, verdict) in sorted(gathered.admitted.items())}
        asked = {each.site: each for each in gathered.choice.participants}
        weights = {site: asked[site].weight for site in updates}
        factors, aggregation_s, step_s = self._advance(last, updates, weights)
        times = RoundTimes(
            exchange_s=exchange_s,
            transfer_s=gathered.transfer_s,
            admission_s=gathered.admission_s,
            aggregation_s=aggregation_s,
            step_s=step_s,
        )
        result = RoundResult(
            run=self.run,
            attempt=self.attempt,
            round_index=index,
            plan=self.plan_digest,
            base_state=last.state,
            checkpoint=self._checkpoint(index),
            participations=gathered.participations,
            weights=shares(weights),
            factors=factors,
            average=average_digest(self.plan, state=self.files.state(index), optimiser=self.files.optimiser(index)),
            offered_at=gathered.offered_at,
            deadline=gathered.deadline,
            committed_at=self.clock.now(),
            times=times,
        )
        approvals = {site: asked[site].approval for site in sorted(updates)}
        self.recorder.record_round(
            result=result, statements=statements, approvals=approvals, updates=dict(sorted(updates.items())), state=self.files.state(index)
        )
        self._tell(Stage.RECORDED, index)
        self.store.commit_round(result, statements)
        self._tell(Stage.COMMITTED, index)
        self.files.sweep(index)
        self._tell(Stage.CLEANED, index)
        return result.checkpoint

    def _advance(
        self, last: Checkpoint, updates: Mapping[SiteName, Path], weights: Mapping[SiteName, float]
    ) -> tuple[dict[SiteName, float], float, float]:
        """Write the next state and optimiser file; the weights' factors, and seconds for the aggregation and for the step."""
        index = last.round_index + 1
        mean = self.files.spool(index) / "mean.safetensors"
        started = time.perf_counter()
        factors = aggregate(self.plan.aggregation, updates, weights, mean)
        averaged = time.perf_counter()
        self._tell(Stage.AVERAGED, index)
        stepping = time.perf_counter()
        step(
            self.plan.server_optimiser,
            step_index=index,
            state=self.settings.home / last.state_path,
            mean_update=mean,
            optimiser_state=self.settings.home / last.optimiser_path,
            next_state=self.files.state(index),
            next_optimiser_state=self.files.optimiser(index),
            trained=self.trained,
            teacher_keeps=self._teacher_keeps(index),
        )
        stepped = time.perf_counter()
        self._tell(Stage.STEPPED, index)
        return factors, averaged - started, stepped - stepping

    def _teacher_keeps(self, index: int) -> float | None:
        teacher = self.plan.objective.teacher
        return None if teacher is None else share_kept(teacher, round_index=index, rounds=self.plan.rounds.count)

    def _checkpoint(self, index: int) -> Checkpoint:
        state, optimiser = self.files.state(index), self.files.optimiser(index)
        return Checkpoint(
            round_index=index,
            state=file_digest(state),
            state_path=self.files.relative(state),
            state_bytes=state.stat().st_size,
            optimiser=file_digest(optimiser),
            optimiser_path=self.files.relative(optimiser),
            optimiser_bytes=optimiser.stat().st_size,
        )

    def _checked(self, last: Checkpoint) -> Checkpoint:
        """The checkpoint, once its files are found to be those that were committed."""
        for relative, due in ((last.state_path, last.state), (last.optimiser_path, last.optimiser)):
            path = self.settings.home / relative
            if not path.is_file() or file_digest(path) != due:
                remedy = "restore the file from a backup of the server's home"
                raise RoundError(
                    ErrorCode.RUN_FAILED, "a file of the last committed round is missing or changed", where=path, remedy=remedy
                )
        return last

    def _tell(self, stage: Stage, index: int, *, site: SiteName | None = None, outcome: str | None = None, code: str | None = None) -> None:
        told = Progress(run=self.run, round_index=index, rounds=self.plan.rounds.count, stage=stage, site=site, outcome=outcome, code=code)
        self.progress(told)
