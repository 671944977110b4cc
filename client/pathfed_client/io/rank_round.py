"""A site's round on several ranks: the same draws, the same order, the same noise as `training.local_round.run_round`.

This process draws patients and tiles and reads the tiles; the ranks compute. Patients, tiles, masks and noise are the single process's, and
the sum over patients has no order: a release is the single process's, bit for bit, where patients' gradients are. They are where each rank
takes patients of its own; where all share a patient's tiles, a gradient is summed over the ranks, and its last digits depend on how many.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pathfed_client.cohort.cohort import Cohort, TileRef
from pathfed_client.io.rank_group import OutOfStepError, RankGroup, failures
from pathfed_client.training.augmentation import NO_AUGMENTATION, Augmentation
from pathfed_client.training.engines.engine import why_not
from pathfed_client.training.local_round import RoundOutcome, TileSource, check_finite, draw_step, random_of_step, read_tiles, untrainable
from pathfed_client.training.private_step import ReleasedFigures, SiteNotes
from pathfed_client.training.ranks.tasks import Begin, Done, EndStep, Outcome, Patient, StepDone, Try
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom


def try_base_state_on_ranks(group: RankGroup, base_state: Mapping[str, Tensor]) -> None:
    """Train on public synthetic tiles on every rank, before the charge; see `training.local_round.try_base_state`.

    Raises:
        PrivacyError: PF306.
        HostError: PF911, a rank failed; `OutOfStepError.out_of_memory` says whether for want of memory.
    """
    check_finite(base_state)
    _put(group, base_state)
    found = failures(group.ask_all(Try()))
    if found:
        raise untrainable(found[0], None)


def run_round_on_ranks(
    group: RankGroup,
    *,
    base_state: Mapping[str, Tensor],
    cohort: Cohort,
    tiles: TileSource,
    mechanism: PatientMechanism,
    tiles_per_patient: int,
    steps: int,
    local_learning_rate: float,
    secret: bytes,
    context: Mapping[str, str | int],
    augmentation: Augmentation = NO_AUGMENTATION,
) -> RoundOutcome:
    """Take a round's private steps; see `training.local_round.run_round`, whose arguments these are.

    Args:
        group: the ranks.
        base_state: the round's start.
        cohort: the patients.
        tiles: reads their tiles.
        mechanism: the public constants of a step.
        tiles_per_patient: k.
        steps: private steps.
        local_learning_rate: step size of the local SGD when there are several.
        secret: with `context` it keys the randomness: `KeyedRandom(secret, context)` is what `run_round` would be given.
        context: everything the release depends on.
        augmentation: how tiles are changed.

    Raises:
        HostError: PF911, a rank ended, failed or was late. All have ended, and nothing was released.
    """
    _put(group, base_state)
    begin = Begin(
        mechanism=mechanism,
        augmentation=augmentation,
        steps=steps,
        local_learning_rate=local_learning_rate,
        context=context,
        secret=secret,
    )
    group.ask_all(begin)
    random, notes, figures = KeyedRandom(secret, context), SiteNotes(), []
    for step in range(steps):
        drawn = draw_step(cohort, mechanism.sampling_rate, tiles_per_patient, random_of_step(random, step))
        tiles.expect([refs for _, refs in drawn])
        hand_out = _HandOut(group, tiles, notes)
        for number, (patient, refs) in enumerate(drawn):
            hand_out.give(number, patient.pseudonym, refs)
        hand_out.finish()
        figures.append(_same(group, group.ask_all(EndStep())))
    shapes = group.spec.layout.update
    update = {name: group.shared.update[name].clone().view(shapes[name]) for name in sorted(shapes)}
    return RoundOutcome(update=update, figures=sum(figures[1:], start=figures[0]), notes=notes)


@dataclass(eq=False)
class _HandOut:
    """Reads patients' tiles into free slots of the shared memory while the ranks compute what was read before."""

    group: RankGroup
    tiles: TileSource
    notes: SiteNotes
    #: By slot: the ranks that have not answered.
    waiting: dict[int, int] = field(default_factory=dict)

    def give(self, number: int, pseudonym: str, refs: tuple[TileRef, ...]) -> None:
        """Read the step's patient of that number and hand it to all ranks, or to its own."""
        self.notes.patients_drawn += 1
        read = self._read(refs)
        if read is None:
            return
        slots = self.group.spec.layout.tiles[0]
        self.group.wait_until(lambda: len(self.waiting) < slots)
        slot = next(slot for slot in range(slots) if slot not in self.waiting)
        self.group.shared.tiles[slot, : len(read)] = read
        ranks = range(self.group.size) if self.group.spec.mode == "sharded" else [number % self.group.size]
        self.waiting[slot] = len(ranks)
        for rank in ranks:
            task = Patient(slot=slot, tiles=len(read), pseudonym=pseudonym)
            self.group.ask(rank, task, partial(self._answered, slot, first=rank == ranks[0]))

    def finish(self) -> None:
        """Wait for all patients; their pixels are overwritten."""
        self.group.wait_until(lambda: not self.waiting)
        self.group.shared.tiles.fill(0)

    def _answered(self, slot: int, outcome: Outcome, *, first: bool) -> None:
        self.waiting[slot] -= 1
        if not self.waiting[slot]:
            del self.waiting[slot]
        if first and isinstance(outcome, Done) and outcome.failure is not None:
            self.notes.fail(outcome.failure)

    def _read(self, refs: tuple[TileRef, ...]) -> NDArray[np.uint8] | None:
        try:
            return read_tiles(refs, self.tiles)
        except Exception as error:  # aborts are releases
            self.notes.fail(why_not(error))
        return None


def _put(group: RankGroup, base_state: Mapping[str, Tensor]) -> None:
    for name, tensor in group.shared.state.items():
        tensor.copy_(base_state[name])


def _same(group: RankGroup, outcomes: list[Outcome]) -> ReleasedFigures:
    """The figures of a step, which every rank must have alike."""
    figures = [outcome.figures for outcome in outcomes if isinstance(outcome, StepDone)]
    if len(figures) != len(outcomes) or any(one != figures[0] for one in figures):
        group.close()
        raise OutOfStepError("the ranks disagree about a step", "their figures differ")
    return figures[0]
