"""The book-keeping engine: several patients in one pass, for few tiles a patient.

One forward over all their tiles, one backward that computes output gradients alone, then patient norms, clip factors, and one weighted
product a layer straight into the sum (`engines.book`, `engines.taps`). No patient's gradient of the whole model ever exists.

Guarantees, beside those of every engine (`engines.engine`):
    - **A parameter whose owner has no rule is refused** when the engine is made, and so is, at the rehearsal before the charge, an
      objective whose layers do not see patients' tiles one patient after the other or that uses a parameter outside its layer.
    - Norms do not come out too small (`engines.book`).
    - Patients with equally many tiles share a pass; those with fewer have passes of their own.

    | in a pass | outcome |
    | --- | --- |
    | a patient's loss or gradient is not finite | contributes zero; the others' pass is run again without it: 0 * NaN never arises |
    | memory runs out, tiles of an odd shape, any other error | nothing was added; the serial engine takes these patients one by one |
    | a buffer or parameter changes | as an error: the serial engine finds out whose pass does it |
    | an error while the sum is added to | the patients count as failed; what was added are their vectors without some coordinates |
"""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.engine import EngineUnfitError, JointSum, NotContributed, PatientTiles, contributes
from pathfed_client.training.engines.guard import StateGuard
from pathfed_client.training.engines.passes import Passes
from pathfed_client.training.engines.serial import SerialEngine, clear_gradients
from pathfed_client.training.engines.taps import tapped
from pathfed_common.privacy.mechanism import PatientMechanism

_log = logging.getLogger(__name__)

#: Largest relative difference between a patient's norm by this engine and by the serial one that rounding explains.
_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.08}


class BookKeepingEngine:
    """Several patients at a time."""

    def __init__(
        self,
        objective: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        mechanism: PatientMechanism,
        compute: Compute | None = None,
        *,
        patients: int,
        tiles_per_patient: int | None = None,
    ) -> None:
        """Make an engine.

        Args:
            objective: what is trained.
            parameters: its trainable parameters by name.
            mechanism: the public constants of a step.
            compute: number type, checkpointing, compiling; default: plain float32.
            patients: how many in one pass.
            tiles_per_patient: k: passes over `patients` with k tiles each are compiled, where `compute` asks for it.

        Raises:
            EngineUnfitError: a trainable parameter's owner has no rule.
        """
        if patients < 1:
            raise ValueError(f"patients must be at least 1, got {patients}")
        compute = Compute() if compute is None else compute
        self.patients = patients
        self._objective, self._parameters, self._mechanism = objective, parameters, mechanism
        self._precision = compute.precision
        self._twin, self._book = tapped(objective, parameters)
        self._guard = StateGuard(self._twin)
        tiles = None if tiles_per_patient is None else patients * tiles_per_patient
        self._passes = Passes(self._twin, compute, tiles=tiles)
        self._serial = SerialEngine(objective, parameters, mechanism, compute, tiles_per_patient=tiles_per_patient)

    def add(self, patients: Sequence[PatientTiles], total: JointSum, /) -> list[str | None]:
        """See `engines.engine.Engine`."""
        outcomes: list[str | None] = [None] * len(patients)
        for places in _equal_counts(patients):
            for place, outcome in zip(places, self._add([patients[place] for place in places], total), strict=True):
                outcomes[place] = outcome
        return outcomes

    def rehearse(self, patients: Sequence[PatientTiles], /) -> None:
        """See `engines.engine.Engine`. Norms are compared with the serial engine's, patient by patient."""
        for places in _equal_counts(patients):
            group = [patients[place] for place in places]
            try:
                figures = self._pass(group)
            finally:
                self._forget()
            if not all(contributes(*figure) for figure in figures):
                raise NotContributed("loss or gradient is not finite")
            serial = [self._serial.norm(patient) for patient in group]
            if not all(_agree(norm, other, _TOLERANCE[self._precision]) for (_, norm), other in zip(figures, serial, strict=True)):
                raise EngineUnfitError(
                    "patients' norms are not those of the serial engine: layers do not see tiles one patient after the other"
                )

    def _add(self, patients: list[PatientTiles], total: JointSum) -> list[str | None]:
        """Add patients with equally many tiles."""
        try:
            figures = self._pass(patients)
        except Exception as error:
            # Aborts are releases (see the serial engine). Nothing was added yet, so the patients may be taken again, one by one.
            _log.info("a pass over %d patients failed (%s); they are taken one by one", len(patients), type(error).__name__)
            figures = None
        try:
            if figures is None:
                self._forget()
                return self._serial.add(patients, total)
            return self._add_noted(patients, figures, total)
        finally:
            self._forget()

    def _add_noted(self, patients: list[PatientTiles], figures: list[tuple[float, float]], total: JointSum) -> list[str | None]:
        finite = [contributes(*figure) for figure in figures]
        if not all(finite):
            self._forget()
            rest = iter(self._add([patient for patient, good in zip(patients, finite, strict=True) if good], total) if any(finite) else [])
            return [next(rest) if good else "loss or gradient is not finite" for good in finite]
        try:
            factors = [self._mechanism.clip_factor(norm) for _, norm in figures]
            shares = [self._mechanism.loss_share(loss) for loss, _ in figures]
            device = next(iter(self._parameters.values())).device
            self._book.add(torch.tensor(factors, dtype=torch.float32, device=device), total.gradients)
        except Exception as error:
            return [type(error).__name__] * len(patients)
        for share in shares:
            total.count(share)
        return [None] * len(patients)

    def _pass(self, patients: list[PatientTiles]) -> list[tuple[float, float]]:
        """Each patient's loss and norm; the book holds the rest.

        Raises:
            NotContributed: a buffer or parameter changed.
            EngineUnfitError: a parameter was used outside its layer, or a layer's rows are not the tiles.
        """
        tiles, draws = _joined(patients)
        self._forget()
        if self._twin.training != self._objective.training:
            self._twin.train(self._objective.training)
        self._book.open(len(patients))
        with self._guard.unchanged():
            losses_P = self._passes.patient_losses(tiles, draws, [len(patient.tiles) for patient in patients])
            torch.autograd.backward(losses_P.sum())
        outside = next((name for name, parameter in self._parameters.items() if parameter.grad is not None), None)
        if outside is not None:
            raise EngineUnfitError(f"parameter {outside!r} is used outside its layer")
        squares_P = self._book.squared_norms().to(losses_P.device)
        found: list[list[float]] = torch.stack([losses_P.detach().double(), squares_P.sqrt()], 1).tolist()
        return [(loss, norm) for loss, norm in found]

    def _forget(self) -> None:
        self._book.close()
        clear_gradients(self._parameters)


def _joined(patients: Sequence[PatientTiles]) -> tuple[Tensor, dict[str, Tensor]]:
    """Tiles and draws of all patients, one patient after the other."""
    first = patients[0]
    if len(patients) == 1:
        return first.tiles, dict(first.draws)
    tiles = torch.cat([patient.tiles for patient in patients])
    return tiles, {name: torch.cat([patient.draws[name] for patient in patients]) for name in first.draws}


def _equal_counts(patients: Sequence[PatientTiles]) -> list[list[int]]:
    """Places of the patients, those with equally many tiles together, in order."""
    groups: dict[int, list[int]] = {}
    for place, patient in enumerate(patients):
        groups.setdefault(len(patient.tiles), []).append(place)
    return list(groups.values())


def _agree(left: float, right: float, tolerance: float) -> bool:
    return math.isclose(left, right, rel_tol=tolerance, abs_tol=1e-6)
