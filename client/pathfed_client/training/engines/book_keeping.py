"""The book-keeping engine: several patients in one pass, for few tiles a patient.

One forward over all their tiles, one backward that computes output gradients alone, then patient norms, and each patient's clipped gradient
one layer at a time into the sum (`engines.book`, `engines.taps`). No patient's gradient of the whole model ever exists.

Guarantees, beside those of every engine (`engines.engine`):
    - **A patient's vector does not depend on who shares the pass.** Passes all have the same shape: P patients with k tiles each, filled up
      with copies of the last one that are computed and not added. Patients with another number of tiles are the serial engine's, and so
      are not mixed in. What comes of a patient's rows is added for that patient alone.
    - **A parameter whose owner has no rule is refused** when the engine is made, and so is, at the rehearsal before the charge, an
      objective whose layers do not see patients' tiles one patient after the other or that uses a parameter outside its layer.
    - Norms do not come out too small (`engines.book`).

What the first supposes: an operation of torch on a tensor of a given shape computes a patient's rows from these rows alone, by the same
arithmetic wherever in the tensor they lie; then a patient who leaves moves others to other places and changes no bit of theirs. The
rehearsal holds it against the very kernels: it takes synthetic patients without the first of them, so that all others move up, and refuses
where a bit of what is noted of them has changed. (Where kernels do not even give the same bits twice, bits tell nothing, and it does not
refuse: what chance does to a patient's vector is not another patient's doing.)

    | in a pass | outcome |
    | --- | --- |
    | a patient's loss or gradient is not finite | contributes zero; no other patient's rows are touched by it |
    | memory runs out, any other error | nothing was added; the serial engine takes these patients one by one |
    | a buffer or parameter changes | as an error: the serial engine finds out whose pass does it |
    | an error while a patient is added | counts as failed; what was added is that patient's vector without some coordinates |

The second and third line change the last digits of the others in the pass. That no patient brings them about rests on the objectives, which
raise on no pixel, and on shapes, which are the same for all patients of a pass.
"""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pathfed_client.training.compute import Compute
from pathfed_client.training.engines.engine import EngineUnfitError, NotContributed, PatientTiles, contributes, why_not
from pathfed_client.training.engines.guard import StateGuard
from pathfed_client.training.engines.passes import Passes
from pathfed_client.training.engines.serial import SerialEngine, clear_gradients
from pathfed_client.training.engines.taps import tapped
from pathfed_client.training.joint_sum import JointSum

_log = logging.getLogger(__name__)

#: Largest relative difference between a patient's norm by this engine and by the serial one that rounding explains.
_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.08}


class BookKeepingEngine:
    """Several patients at a time."""

    def __init__(
        self,
        objective: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        compute: Compute | None = None,
        *,
        patients: int,
        tiles_per_patient: int,
    ) -> None:
        """Make an engine.

        Args:
            objective: what is trained.
            parameters: its trainable parameters by name.
            compute: number type, checkpointing, compiling; default: plain float32.
            patients: P, how many in one pass.
            tiles_per_patient: k: passes are over P patients with k tiles each; patients with fewer are taken one by one.

        Raises:
            EngineUnfitError: a trainable parameter's owner has no rule.
        """
        if patients < 1 or tiles_per_patient < 1:
            raise ValueError(f"patients and tiles_per_patient must be at least 1, got {patients} and {tiles_per_patient}")
        compute = Compute() if compute is None else compute
        self.patients = patients
        self._objective, self._parameters, self._tiles = objective, parameters, tiles_per_patient
        self._precision = compute.precision
        self._twin, self._book = tapped(objective, parameters)
        self._guard = StateGuard(self._twin)
        self._passes = Passes(self._twin, compute, tiles=patients * tiles_per_patient)
        self._serial = SerialEngine(objective, parameters, compute, tiles_per_patient=tiles_per_patient)

    def add(self, patients: Sequence[PatientTiles], total: JointSum, /) -> list[str | None]:
        """See `engines.engine.Engine`."""
        outcomes: list[str | None] = [None] * len(patients)
        for places in self._passes_of(patients):
            for place, outcome in zip(places, self._add([patients[place] for place in places], total), strict=True):
                outcomes[place] = outcome
        return outcomes

    def rehearse(self, patients: Sequence[PatientTiles], /) -> None:
        """See `engines.engine.Engine`. Norms are compared with the serial engine's, and a pass with that without its first patient."""
        for places in self._passes_of(patients):
            group = [patients[place] for place in places]
            if len(group[0].tiles) != self._tiles:
                self._serial.rehearse(group)
                continue
            figures = self._seen(group)[0]
            if not all(contributes(*figure) for figure in figures):
                raise NotContributed("loss or gradient is not finite")
            serial = [self._serial.norm(patient) for patient in group]
            if not all(_agree(norm, other, _TOLERANCE[self._precision]) for (_, norm), other in zip(figures, serial, strict=True)):
                raise EngineUnfitError(
                    "patients' norms are not those of the serial engine: layers do not see tiles one patient after the other"
                )
            self._check_places(group)

    def _passes_of(self, patients: Sequence[PatientTiles]) -> list[list[int]]:
        """Places of the patients of each pass: alike in all that a pass is shaped by, and `self.patients` at most."""
        alike: dict[object, list[int]] = {}
        for place, patient in enumerate(patients):
            alike.setdefault(_shapes(patient), []).append(place)
        return [places[start : start + self.patients] for places in alike.values() for start in range(0, len(places), self.patients)]

    def _check_places(self, patients: list[PatientTiles]) -> None:
        """Refuse, if what is noted of a patient depends on who shares the pass or where in it the patient lies."""
        if len(patients) == 1:
            return
        with_first, without = self._seen(patients), self._seen(patients[1:])
        alike = with_first[0][1:] == without[0] and torch.equal(with_first[1][:, 1:], without[1])
        if alike:
            return
        again = self._seen(patients)
        if with_first[0] == again[0] and torch.equal(with_first[1], again[1]):
            raise EngineUnfitError("a patient's gradient depends on who shares the pass")
        _log.info("the device does not give the same bits twice, so they cannot tell whether patients are computed apart")

    def _seen(self, patients: list[PatientTiles]) -> tuple[list[tuple[float, float]], Tensor]:
        """Each patient's loss and norm, and the fingerprints of what was noted, (n, P)."""
        try:
            return self._pass(patients), self._book.fingerprints()[:, : len(patients)]
        finally:
            self._forget()

    def _add(self, patients: list[PatientTiles], total: JointSum) -> list[str | None]:
        """Add patients who are alike, one pass of them at most."""
        try:
            if len(patients[0].tiles) != self._tiles:
                return self._serial.add(patients, total)
            try:
                figures = self._pass(patients)
            except Exception as error:
                # Aborts are releases (see the serial engine). Nothing was added yet, so the patients may be taken again, one by one.
                _log.info("a pass over %d patients failed (%s); they are taken one by one", len(patients), type(error).__name__)
                self._forget()
                return self._serial.add(patients, total)
            return [self._add_noted(place, *figure, total) for place, figure in enumerate(figures)]
        finally:
            self._forget()

    def _add_noted(self, place: int, loss: float, norm: float, total: JointSum) -> str | None:
        """Add the patient at that place of the pass."""
        if not contributes(loss, norm):
            return "loss or gradient is not finite"
        try:
            total.add(self._book.gradients(place), norm=norm, loss=loss)
        except Exception as error:  # aborts are releases
            return why_not(error)
        return None

    def _pass(self, patients: list[PatientTiles]) -> list[tuple[float, float]]:
        """Each patient's loss and norm; the book holds the rest. Patients are alike, and filled up with copies of the last one.

        Raises:
            NotContributed: a buffer or parameter changed.
            EngineUnfitError: a parameter was used outside its layer, or a layer's rows are not the tiles.
        """
        filled = patients + patients[-1:] * (self.patients - len(patients))
        tiles, draws = _joined(filled)
        self._forget()
        if self._twin.training != self._objective.training:
            self._twin.train(self._objective.training)
        self._book.open(len(filled))
        with self._guard.unchanged():
            losses_P = self._passes.patient_losses(tiles, draws, [len(patient.tiles) for patient in filled])
            torch.autograd.backward(losses_P.sum())
        outside = next((name for name, parameter in self._parameters.items() if parameter.grad is not None), None)
        if outside is not None:
            raise EngineUnfitError(f"parameter {outside!r} is used outside its layer")
        squares_P = self._book.squared_norms().to(losses_P.device)
        found: list[list[float]] = torch.stack([losses_P.detach().double(), squares_P.sqrt()], 1).tolist()
        return [(loss, norm) for loss, norm in found[: len(patients)]]

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


def _shapes(patient: PatientTiles) -> tuple[object, ...]:
    """All that a pass is shaped by."""
    return patient.tiles.shape, patient.tiles.dtype, *((name, drawn.shape, drawn.dtype) for name, drawn in sorted(patient.draws.items()))


def _agree(left: float, right: float, tolerance: float) -> bool:
    return math.isclose(left, right, rel_tol=tolerance, abs_tol=1e-6)
