"""A site's round: load the base state, take the private steps, give back one update.

The caller has checked the offer, tried the base state (`try_base_state`) and **charged the ledger** before it calls `run_round`.

One step: the update is the step's noised gradient. Several: the site steps locally with plain SGD, each step noised and charged, and the
update is (start - end) / (local_learning_rate * steps), the mean of the released gradients, a pseudo-gradient of the same scale.

    | event | outcome |
    | --- | --- |
    | no patient is drawn | noise is released |
    | some tiles of a patient are unreadable | they are left out; the mean is over the others |
    | no tile of a patient is readable, or anything else goes wrong with a patient | that patient contributes zero |
    | more noise than numbers in reach: a local step ends in a non-finite state | the update says so; nothing is hidden or retried |
    | base state with other names, shapes, or non-finite numbers | refused by `try_base_state`, before the charge |
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathfed_client.cohort.cohort import Cohort, Patient, TileRef
from pathfed_client.cohort.sampling import draw_patients, draw_tiles
from pathfed_client.training.augmentation import NO_AUGMENTATION, Augmentation, training_tensors
from pathfed_client.training.engines.engine import (
    Engine,
    EngineUnfitError,
    NotContributed,
    PatientLoader,
    PatientTiles,
    check_objective,
    trainable,
)
from pathfed_client.training.engines.serial import clear_gradients, out_of_memory, patient_gradient
from pathfed_client.training.private_step import ReleasedFigures, SiteNotes, private_step
from pathfed_common.errors import ErrorCode, HostError, PrivacyError
from pathfed_common.objectives.objective import Objective
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom


class TileSource(Protocol):
    """Reads tiles."""

    def expect(self, batches: Sequence[Sequence[TileRef]], /) -> None:
        """What `read` will be asked for, in this order, so that tiles may be read ahead. Replaces what was announced before."""
        ...

    def read(self, refs: Sequence[TileRef], /) -> NDArray[np.uint8]:
        """The tiles as RGB (n, h, w, 3), n <= len(refs): an unreadable tile is left out, never white. MUST give no other patient's tile."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundOutcome:
    """A round's result at a site.

    Attributes:
        update: name to fp32 tensor, to be rounded to the plan's wire format, sealed and sent.
        figures: noised loss and patient count, summed over the steps.
        notes: what stays at the site.
    """

    update: dict[str, Tensor]
    figures: ReleasedFigures
    notes: SiteNotes


def run_round(
    *,
    objective: nn.Module,
    base_state: Mapping[str, Tensor],
    cohort: Cohort,
    tiles: TileSource,
    mechanism: PatientMechanism,
    tiles_per_patient: int,
    steps: int,
    local_learning_rate: float,
    random: KeyedRandom,
    augmentation: Augmentation = NO_AUGMENTATION,
    engine: Engine | None = None,
) -> RoundOutcome:
    """Take a round's private steps.

    Afterwards the objective holds `base_state` again, no gradient, and is in the mode (train or eval) that it came in: nothing that
    depends on patients is left in it.

    Args:
        objective: the model; its state is replaced by `base_state`.
        base_state: the round's start, all tensors of the objective's state by name.
        cohort: the patients.
        tiles: reads their tiles.
        mechanism: the public constants of a step.
        tiles_per_patient: k, tiles drawn for a drawn patient; a patient with fewer gives all.
        steps: private steps, at least 1.
        local_learning_rate: step size of the local SGD when there are several.
        random: keyed by everything the round's release depends on, and used for no other round.
        augmentation: how tiles are changed before training sees them.
        engine: made for this objective (`engines.choice.make_engine`), the one that `try_base_state` tried; the serial one
            in float32 if not given. What its bits depend on (`Compute.context`) belongs to what keys `random`.

    Raises:
        ValueError: an argument is out of bounds, `base_state` does not fit, or the objective would couple patients.
    """
    if steps < 1 or tiles_per_patient < 1 or not local_learning_rate > 0:
        given = f"{steps}, {tiles_per_patient}, {local_learning_rate}"
        raise ValueError(f"steps, tiles_per_patient and local_learning_rate must be positive, got {given}")
    training = objective.training
    notes = SiteNotes()
    load_state(objective, base_state)
    try:
        objective.train()
        parameters = trainable(objective)
        check_objective(objective, parameters)
        figures: list[ReleasedFigures] = []
        for step in range(steps):
            step_random = random_of_step(random, step)
            drawn = draw_step(cohort, mechanism.sampling_rate, tiles_per_patient, step_random)
            tiles.expect([refs for _, refs in drawn])
            loaders = [
                _loader(objective, refs, tiles, augmentation, random_of_patient(step_random, patient.pseudonym)) for patient, refs in drawn
            ]
            release = private_step(objective, parameters, loaders, mechanism, step_random, engine=engine, notes=notes)
            figures.append(release.figures)
            if steps > 1:
                _descend(parameters, release.gradients, local_learning_rate)
        update = release.gradients if steps == 1 else _difference(base_state, parameters, local_learning_rate * steps)
    finally:
        load_state(objective, base_state)
        objective.train(training)
    return RoundOutcome(update=update, figures=sum(figures[1:], start=figures[0]), notes=notes)


def random_of_step(random: KeyedRandom, step: int) -> KeyedRandom:
    """The source of a round's step, from 0."""
    return random.child("step", step)


def random_of_patient(step_random: KeyedRandom, pseudonym: str) -> KeyedRandom:
    """The source of a step's patient: masks and augmentation, whoever else was drawn."""
    return step_random.child("patient", pseudonym)


def draw_step(
    cohort: Cohort, sampling_rate: float, tiles_per_patient: int, step_random: KeyedRandom
) -> list[tuple[Patient, tuple[TileRef, ...]]]:
    """A step's patients, each with the tiles drawn for it."""
    drawn = draw_patients(cohort, sampling_rate, step_random.child("sampling"))
    return [(patient, draw_tiles(patient, tiles_per_patient, step_random.child("tiles", patient.pseudonym))) for patient in drawn]


def try_base_state(
    *, objective: nn.Module, base_state: Mapping[str, Tensor], tile_px: int, tiles_per_patient: int, engine: Engine | None = None
) -> None:
    """Train on public synthetic tiles, before the charge: a base state that breaks does so here, where it tells nothing of a patient.

    Runs whole microbatches of `tiles_per_patient`, as many patients at once as the engine takes, so that want of memory shows here too.
    Afterwards the objective holds `base_state`.

    Args:
        objective: the model; its state is replaced.
        base_state: all tensors of the objective's state by name.
        tile_px: side of a tile, pixels.
        tiles_per_patient: k.
        engine: the very engine that the round will use; the serial one in float32 if not given.

    Raises:
        PrivacyError: PF306, the base state does not fit, is not finite, or its loss or gradient on the synthetic tiles is not; PF312, the
            engine's gradients are not the objective's.
        HostError: PF912, it does not fit into memory, however few tiles the engine takes at once.
        ValueError: the objective would couple patients.
    """
    parameters = trainable(objective)
    check_objective(objective, parameters)
    check_finite(base_state)
    training = objective.training
    try:
        load_state(objective, base_state)
        objective.train()
        at_once = 1 if engine is None else engine.patients
        patients = synthetic_patients(objective, tile_px, tiles_per_patient, multiple_of=at_once)
        while batch := list(islice(patients, at_once)):
            if engine is None:
                patient_gradient(objective, parameters, batch[0])
            else:
                engine.rehearse(batch)
    except EngineUnfitError as error:
        raise unfit_engine(error) from None
    except NotContributed as reason:
        raise untrainable(str(reason), None) from None
    except (ValueError, RuntimeError, MemoryError) as error:
        # Torch reports shapes that do not fit and memory that runs out as RuntimeError.
        if out_of_memory(error):
            raise too_small(type(error).__name__) from error
        raise untrainable(str(error)[:200], type(error).__name__) from error
    finally:
        clear_gradients(parameters)
        objective.train(training)


def unfit_engine(error: EngineUnfitError) -> PrivacyError:
    """PF312: the plan's engine cannot compute this objective's gradients."""
    remedy = 'nothing was charged or released; the operator sets engine = "serial" in the plan\'s [compute]'
    return PrivacyError(ErrorCode.ENGINE_UNFIT, str(error), remedy=remedy)


def check_finite(base_state: Mapping[str, Tensor]) -> None:
    """Refuse a base state that is not finite.

    Raises:
        PrivacyError: PF306.
    """
    broken = next((name for name, tensor in base_state.items() if not torch.isfinite(tensor).all()), None)
    if broken is not None:
        raise untrainable("it holds numbers that are not finite", broken)


def too_small(value: str) -> HostError:
    """PF912: not even one tile at a time fits into the memory."""
    what = "the memory that training may use does not hold one tile of this plan"
    remedy = "nothing was charged; raise device_memory_gb in policy.toml, or share the model among more GPUs"
    return HostError(ErrorCode.MEMORY_TOO_SMALL, what, value=value, remedy=remedy)


def untrainable(what: str, value: str | None) -> PrivacyError:
    """PF306: the base state cannot be trained on synthetic tiles."""
    remedy = "nothing was charged or released; tell the consortium's operator"
    message = f"the base state cannot be trained on synthetic tiles: {what}"
    return PrivacyError(ErrorCode.BASE_STATE_UNTRAINABLE, message, value=value, remedy=remedy)


def _public(*parts: str | int) -> KeyedRandom:
    return KeyedRandom(bytes(32), {"purpose": "public synthetic tiles"}).child("draw", *parts)


def synthetic_patients(objective: nn.Module, tile_px: int, tiles_per_patient: int, *, multiple_of: int = 1) -> Iterator[PatientTiles]:
    """Public tiles, by k, as the objective takes them: the same each time, a multiple of so many."""
    for number, tiles_NHWC in enumerate(_synthetic_tiles(tile_px, tiles_per_patient, multiple_of)):
        yield patient_tiles(objective, tiles_NHWC, NO_AUGMENTATION, _public("tiles", number))


def _synthetic_tiles(side: int, k: int, patients: int = 1) -> list[NDArray[np.uint8]]:
    """Batches (k, side, side, 3), a multiple of `patients`: black, white, grey, ramp, chequerboard, stains; each at least once."""
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    board = (np.indices((side, side)).sum(0) // 8 % 2 * 255).astype(np.uint8)
    pink = np.array([230, 170, 210]) - (_public("tile").uniforms(side * side).reshape(side, side, 1) * np.array([110, 120, 60]))
    planes = [np.zeros((side, side)), np.full((side, side), 255), np.full((side, side), 128), np.broadcast_to(ramp, (side, side)), board]
    kinds = [*(np.repeat(plane[..., None], 3, axis=2).astype(np.uint8) for plane in planes), pink.astype(np.uint8)]
    count = -(-len(kinds) // (k * patients)) * k * patients
    tiles = np.stack([kinds[index % len(kinds)] for index in range(count)])
    return list(tiles.reshape(-1, k, side, side, 3))


def load_state(objective: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state into the objective.

    Raises:
        ValueError: names or shapes differ from the objective's, or the state lies in the objective's own memory.
    """
    own = objective.state_dict()
    if set(own) != set(state):
        raise ValueError(f"the state's names differ from the objective's in {sorted(set(own) ^ set(state))[:5]}")
    for name, tensor in own.items():
        given = state[name]  # once: it may be read from a file
        if tensor.shape != given.shape:
            raise ValueError(f"tensor {name!r} must have shape {tuple(tensor.shape)}, got {tuple(given.shape)}")
        if tensor.numel() and tensor.data_ptr() == given.data_ptr():
            raise ValueError(f"tensor {name!r} of the state is the objective's own: a local step would change it")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _loader(
    objective: nn.Module, refs: Sequence[TileRef], tiles: TileSource, augmentation: Augmentation, random: KeyedRandom
) -> PatientLoader:
    """Reads a patient's tiles when called. All draws are keyed by the pseudonym, so they do not depend on who else was drawn."""

    def load() -> PatientTiles:
        return patient_tiles(objective, read_tiles(refs, tiles), augmentation, random)

    return load


def read_tiles(refs: Sequence[TileRef], tiles: TileSource) -> NDArray[np.uint8]:
    """A patient's tiles (n, H, W, 3), n >= 1.

    Raises:
        NotContributed: there is none, or none can be read.
    """
    if not refs:
        raise NotContributed("the patient has no tile")
    read = tiles.read(refs)
    if not 0 < len(read) <= len(refs):
        raise NotContributed(f"{len(read)} of {len(refs)} tiles were read")
    return read


def patient_tiles(objective: nn.Module, tiles_NHWC: NDArray[np.uint8], augmentation: Augmentation, random: KeyedRandom) -> PatientTiles:
    """Tiles (N, H, W, 3) uint8 as the objective takes them, on its device, augmented, with the objective's draws; all by `random`."""
    device = next(objective.parameters()).device
    drawn = cast(Objective, objective).draw(len(tiles_NHWC), random.child("masks"))
    tiles_NCHW = training_tensors(tiles_NHWC, augmentation, random.child("augmentation"), device)
    return PatientTiles(tiles_NCHW, {name: tensor.to(device) for name, tensor in drawn.items()})


def _descend(parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], learning_rate: float) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(gradients[name], alpha=-learning_rate)


def _difference(start: Mapping[str, Tensor], end: Mapping[str, nn.Parameter], scale: float) -> dict[str, Tensor]:
    return {name: (start[name].to(end[name].device, torch.float32) - end[name].detach().float()).div_(scale) for name in sorted(end)}
