"""The private step: drawn patients in, one noised release out.

Guarantees:
    - One step is one Poisson-subsampled Gaussian event of `PatientMechanism`, if the caller drew the patients with its rate: each
      contributes one vector of norm at most C, and every released coordinate carries noise of std sigma * C.
    - **It releases whatever happens to a patient.** A tile that does not decode, memory that runs out, a loss that is not finite: that
      patient contributes zero to everything, the count included, and the step goes on. Whether a release comes out therefore depends on
      public facts only. Only faults of the code or the plan raise, and they do so before the first patient.
    - An empty step releases noise.
    - Noise is keyed by the parameter's name: it depends on `random`, the name and the shape, never on data or order.
    - The sum is divided by the public B. The actual number of patients appears in no divisor, length or key.
    - The sum is exact and does not depend on the order of patients; with noise it is rounded to a coarse public grid, then once to fp32
      (`training.joint_sum`).
    - Peak memory beside the activations: one gradient, one 32-bit accumulator, one chunk of noise.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor, nn

from pathfed_client.training.engines.engine import Engine, PatientLoader, PatientTiles, check_objective, why_not
from pathfed_client.training.engines.serial import SerialEngine, clear_gradients
from pathfed_client.training.joint_sum import JointSum, release
from pathfed_common.privacy.mechanism import PatientMechanism
from pathfed_common.privacy.randomness import KeyedRandom

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReleasedFigures:
    """Noised figures and the std of their noise. They add up, over steps and over sites.

    Attributes:
        loss_sum: noised sum over patients of the clamped loss.
        loss_sum_std: std of its noise.
        patients: noised number of patients who contributed.
        patients_std: std of its noise.
    """

    loss_sum: float
    loss_sum_std: float
    patients: float
    patients_std: float

    def __add__(self, other: "ReleasedFigures") -> "ReleasedFigures":
        return ReleasedFigures(
            loss_sum=self.loss_sum + other.loss_sum,
            loss_sum_std=math.hypot(self.loss_sum_std, other.loss_sum_std),
            patients=self.patients + other.patients,
            patients_std=math.hypot(self.patients_std, other.patients_std),
        )


@dataclass(frozen=True, eq=False)
class Release:
    """What one private step gives away.

    Attributes:
        gradients: name to (noised sum of clipped gradients) / B, fp32.
        figures: noised loss and patient count.
    """

    gradients: dict[str, Tensor]
    figures: ReleasedFigures


@dataclass
class SiteNotes:
    """What happened to patients in a step or round. Sensitive: it stays at the site, in its own log at most.

    Attributes:
        patients_drawn: patients the steps drew.
        failures: why a drawn patient contributed zero, one short text each.
    """

    patients_drawn: int = 0
    failures: list[str] = field(default_factory=list)

    def fail(self, why: str) -> None:
        """Note, and log at the site, that a drawn patient contributes zero."""
        self.failures.append(why)
        _log.info("a drawn patient contributes zero: %s", why)


def private_step(
    objective: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    drawn: Iterable[PatientLoader],
    mechanism: PatientMechanism,
    random: KeyedRandom,
    *,
    engine: Engine | None = None,
    notes: SiteNotes | None = None,
) -> Release:
    """Sum the drawn patients' clipped vectors, add noise, divide by B.

    Args:
        objective: the model with its loss; see `objectives.objective.Objective`.
        parameters: its trainable parameters by name. They are read, never changed.
        drawn: one loader for each drawn patient.
        mechanism: the public constants.
        random: the step's own source; never used for another step.
        engine: made for this objective and these parameters; the serial one if not given.
        notes: filled in with what stays at the site.

    Raises:
        ValueError: the objective would couple patients (`engines.engine.check_objective`), or has too many parameters for the lattice.
    """
    check_objective(objective, parameters)
    notes = SiteNotes() if notes is None else notes
    engine = SerialEngine(objective, parameters) if engine is None else engine
    total = JointSum(parameters, mechanism)
    loaders = iter(drawn)
    while batch := list(islice(loaders, engine.patients)):
        notes.patients_drawn += len(batch)
        for failure in _contribute(engine, batch, total):
            notes.fail(failure)
    clear_gradients(parameters)
    return _release(total, mechanism, random)


def _contribute(engine: Engine, batch: list[PatientLoader], total: JointSum) -> Iterator[str]:
    """Add some patients; the reason for each who contributes zero."""
    loaded: list[PatientTiles] = []
    for load in batch:
        try:
            loaded.append(load())
        except Exception as error:  # aborts are releases
            yield why_not(error)
    yield from (failure for failure in engine.add(loaded, total) if failure is not None)


def _release(total: JointSum, mechanism: PatientMechanism, random: KeyedRandom) -> Release:
    """Noise on every coordinate of the joint sum, whose memory becomes the release's."""
    gradients = {name: release(integers, mechanism, noise_source(random, name)) for name, integers in total.integers.items()}
    return Release(gradients=gradients, figures=released_figures(total, mechanism, random))


def noise_source(random: KeyedRandom, name: str) -> KeyedRandom:
    """The source of a parameter's noise in a step: the number at place i of the flattened parameter gets normal i of its range."""
    return random.child("noise", name)


def released_figures(total: JointSum, mechanism: PatientMechanism, random: KeyedRandom) -> ReleasedFigures:
    """Noise on the two figures of the joint sum."""
    loss_sum, patients = total.release_figures(random.child("figure noise"))
    return ReleasedFigures(loss_sum=loss_sum, loss_sum_std=mechanism.loss_sum_std, patients=patients, patients_std=mechanism.patients_std)
