"""What one rank does in a round. It sees tiles, pseudonyms and the round's secret, never a slide; it gives back noised numbers alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathfed_client.training.engines.choice import make_engine
from pathfed_client.training.engines.engine import (
    NotContributed,
    PatientLoader,
    PatientTiles,
    check_objective,
    trainable,
    why_not,
)
from pathfed_client.training.engines.serial import clear_gradients
from pathfed_client.training.joint_sum import JointSum, release
from pathfed_client.training.local_round import patient_tiles, random_of_patient, random_of_step, synthetic_patients
from pathfed_client.training.private_step import ReleasedFigures, noise_source, released_figures
from pathfed_client.training.ranks.group import Ranks
from pathfed_client.training.ranks.replicated import joined
from pathfed_client.training.ranks.sharded import ShardedEngine
from pathfed_client.training.ranks.shards import Piece, even_run, load_pieces, piece, shard
from pathfed_client.training.ranks.tasks import Begin, Join, Patient
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

#: A try clips nothing and adds nothing up: its constants do not matter.
_ANY = PatientMechanism(sampling_rate=1, noise_multiplier=1, clip_norm=1, expected_patients=1, figure_share=0.5, loss_bound=1)


@dataclass(frozen=True, eq=False)
class SharedNumbers:
    """Memory that all ranks and the site's process share.

    Attributes:
        state: the base state's tensors by name, written by the site's process.
        update: the trained tensors by name, fp32, flattened; each rank writes the released numbers that are its own.
        tiles: uint8 (slots, k, H, W, 3), written by the site's process.
    """

    state: Mapping[str, Tensor]
    update: Mapping[str, Tensor]
    tiles: NDArray[np.uint8]


class _Way(Protocol):
    """How the ranks share the work of a step."""

    def empty_sum(self) -> JointSum:
        """This rank's part of the sum, at zero."""
        ...

    def add(self, load: PatientLoader, total: JointSum) -> str | None:
        """Add a patient; why the patient contributes zero, or None."""
        ...

    def attempt(self, load: PatientLoader) -> None:
        """Compute a gradient and drop it; raises NotContributed."""
        ...

    def summed(self, total: JointSum) -> dict[str, Piece]:
        """The numbers of the whole sum that this rank adds noise to; the figures of `total` become those of all ranks."""
        ...


class _Sharded:
    def __init__(self, objective: nn.Module, parameters: Mapping[str, nn.Parameter], mechanism: PatientMechanism, job: Join, ranks: Ranks):
        self._engine = ShardedEngine(objective, parameters, mechanism, ranks, job.compute, tiles_at_once=job.tiles_at_once)
        self._first = ranks.rank == 0

    def empty_sum(self) -> JointSum:
        return self._engine.empty_sum()

    def add(self, load: PatientLoader, total: JointSum) -> str | None:
        return self._engine.add(load, total)

    def attempt(self, load: PatientLoader) -> None:
        self._engine.gradient(load)

    def summed(self, total: JointSum) -> dict[str, Piece]:
        """What every rank holds whole is rank 0's to release."""
        pieces = self._engine.pieces.items()
        return {name: Piece(total.integers[name], held.start, held.whole) for name, held in pieces if self._first or not held.whole}


class _Replicated:
    def __init__(self, objective: nn.Module, parameters: Mapping[str, nn.Parameter], mechanism: PatientMechanism, job: Join, ranks: Ranks):
        self._parameters, self._mechanism, self._ranks = parameters, mechanism, ranks
        k, px, at_once = job.tiles_per_patient, job.tile_px, job.tiles_at_once
        self._engine = make_engine(objective, parameters, job.compute, tiles_per_patient=k, tile_px=px, tiles_at_once=at_once)

    def empty_sum(self) -> JointSum:
        return JointSum(self._parameters, self._mechanism)

    def add(self, load: PatientLoader, total: JointSum) -> str | None:
        try:
            patient = load()
        except Exception as error:  # aborts are releases
            return why_not(error)
        return self._engine.add([patient], total)[0]

    def attempt(self, load: PatientLoader) -> None:
        self._engine.rehearse([load()])

    def summed(self, total: JointSum) -> dict[str, Piece]:
        return joined(total, self._ranks)


class RankProgram:
    """One rank's model, and the round it is in."""

    def __init__(self, job: Join, ranks: Ranks, shared: SharedNumbers) -> None:
        """Build the model on this rank's device, sharded or whole.

        Args:
            job: what was asked for.
            ranks: this process among the others.
            shared: the memory.

        Raises:
            ValueError: the objective would couple patients, or cannot be trained in this mode.
        """
        self._job, self._ranks, self._shared = job, ranks, shared
        objective = job.build()
        check_objective(objective, trainable(objective))
        self._objective = objective.to(torch.device(job.device)).train()
        if job.mode == "sharded":
            shard(self._objective)
        self._parameters = trainable(self._objective)
        self._round: _Round | None = None

    def attempt(self) -> str | None:
        """Train on the synthetic tiles from the base state; why that cannot be done, or None. The same on every rank."""
        self._load_state()
        way = self._way(_ANY)
        failure = None
        for patient in synthetic_patients(self._objective, self._job.tile_px, self._job.tiles_per_patient):
            try:
                way.attempt(_loaded(patient))
            except NotContributed as reason:
                failure = str(reason)
        clear_gradients(self._parameters)
        return failure

    def begin(self, begin: Begin) -> None:
        """Start a round."""
        self._load_state()
        random = KeyedRandom(begin.secret, begin.context)
        way = self._way(begin.mechanism)
        self._round = _Round(begin, random, way, way.empty_sum(), random_of_step(random, 0))

    def patient(self, patient: Patient) -> str | None:
        """Add a patient to the step's sum; why the patient contributes zero, or None."""
        here = self._running()

        def load() -> PatientTiles:
            read = self._shared.tiles[patient.slot, : patient.tiles]
            return patient_tiles(self._objective, read, here.begin.augmentation, random_of_patient(here.step_random, patient.pseudonym))

        return here.way.add(load, here.total)

    def end_step(self) -> ReleasedFigures:
        """Add the noise, and step locally or end the round. Afterwards nothing that depends on patients is left but what was released."""
        here = self._running()
        mechanism, rate = here.begin.mechanism, here.begin.local_learning_rate
        clear_gradients(self._parameters)
        pieces = here.way.summed(here.total)
        for name, held in pieces.items():
            released = release(held.values, mechanism, noise_source(here.step_random, name), start=held.start)
            self._shared.update[name][held.start : held.stop].copy_(released.view(-1))
        figures = released_figures(here.total, mechanism, here.step_random)
        self._meet()
        here.step += 1
        if here.begin.steps > 1:
            self._descend(rate)
        if here.step < here.begin.steps:
            here.total, here.step_random = here.way.empty_sum(), random_of_step(here.random, here.step)
            return figures
        if here.begin.steps > 1:
            self._meet()
            self._write_difference(rate * here.begin.steps)
        self._round = None
        self._load_state()
        return figures

    def _descend(self, learning_rate: float) -> None:
        """A step of SGD along what was just released, on the numbers this rank holds."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                held = piece(parameter, self._ranks.rank, self._ranks.size)
                released = self._shared.update[name][held.start : held.stop].to(parameter.device)
                held.values.view(-1).add_(released, alpha=-learning_rate)

    def _write_difference(self, scale: float) -> None:
        """The update of several steps: (start - end) / scale, each number written by one rank."""
        rank, ranks = self._ranks.rank, self._ranks.size
        for name, parameter in self._parameters.items():
            held = piece(parameter, rank, ranks)
            first, last = even_run(parameter.numel(), rank, ranks) if held.whole else (held.start, held.stop)
            end = held.values.detach().view(-1)[first - held.start : last - held.start].float()
            start = self._shared.state[name].view(-1)[first:last].to(end.device, torch.float32)
            self._shared.update[name][first:last].copy_((start - end).div_(scale))

    def _load_state(self) -> None:
        load_pieces(self._objective, self._shared.state, self._ranks.rank, self._ranks.size)

    def _way(self, mechanism: PatientMechanism) -> _Way:
        made = _Sharded if self._job.mode == "sharded" else _Replicated
        return made(self._objective, self._parameters, mechanism, self._job, self._ranks)

    def _running(self) -> "_Round":
        if self._round is None:
            raise ValueError("no round has begun")
        return self._round

    def _meet(self) -> None:
        """Wait for all ranks."""
        self._ranks.every([0.0])


@dataclass(eq=False)
class _Round:
    begin: Begin
    random: KeyedRandom
    way: _Way
    total: JointSum
    step_random: KeyedRandom
    step: int = 0


def _loaded(patient: PatientTiles) -> PatientLoader:
    return lambda: patient
