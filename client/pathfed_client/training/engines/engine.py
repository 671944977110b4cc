"""What every engine is, and what they share: a patient's tiles, the sensitive sum, and what an objective must not do.

An engine turns patients' tiles into clipped gradients in the sum. Guarantees of every engine:

    - A patient adds a vector of norm at most C to the sum, whatever the objective computes; if adding stops half-way, what was added is
      that vector with some coordinates left out, whose norm is no larger.
    - **That vector is made of that patient alone**: of the patient's tiles and draws, in passes whose shape no other patient has a part in.
      The sum is exact (`training.joint_sum`), so that it differs by just that vector when the patient leaves. `engines.book_keeping` says
      what this supposes of torch.
    - What happens to one patient (an error, a number that is not finite) leaves no trace in another's contribution.
    - What would couple patients is refused before the first one (`check_objective`): layers with statistics over a batch (BatchNorm,
      InstanceNorm with running statistics), layers that draw from torch's global generator (dropout), parameters that are tied or not
      the objective's own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from pathfed_client.training.joint_sum import JointSum
from pathfed_common.objectives.objective import Draws


@dataclass(frozen=True, eq=False)
class PatientTiles:
    """One patient's tiles as the objective takes them.

    Attributes:
        tiles: float32 (N, 3, H, W), N >= 1.
        draws: what the objective drew for these N tiles.
    """

    tiles: Tensor
    draws: Draws

    def part(self, start: int, stop: int) -> "PatientTiles":
        """The tiles from `start` up to `stop`, with what was drawn for them."""
        return PatientTiles(self.tiles[start:stop], {name: drawn[start:stop] for name, drawn in self.draws.items()})


#: Reads one drawn patient's tiles when it is called; raises `NotContributed` where there is no readable one.
PatientLoader = Callable[[], PatientTiles]


class NotContributed(Exception):  # noqa: N818  an outcome, not a fault
    """This patient contributes zero; the text says why and never leaves the site."""


def why_not(error: Exception) -> str:
    """What is noted of an error that one patient caused: the reason of a `NotContributed`, else the error's type alone.

    Aborts are releases: whether a step answers must not depend on a patient's tiles, so nothing that one patient causes may pass. A text
    could name a slide, and a traceback would keep the patient's gradient in memory.
    """
    return str(error) if isinstance(error, NotContributed) else type(error).__name__


class EngineUnfitError(ValueError):
    """An engine cannot compute this objective's patient gradients. Depends on the code and the plan alone."""


def contributes(loss: float, norm: float) -> bool:
    """Whether a patient with this loss and gradient norm contributes: both must be finite."""
    return math.isfinite(loss) and math.isfinite(norm)


def trainable(objective: nn.Module) -> dict[str, nn.Parameter]:
    """The objective's trainable parameters by name, in order of their names."""
    return {name: parameter for name, parameter in sorted(objective.named_parameters()) if parameter.requires_grad}


def check_objective(objective: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse an objective whose patient gradients would not be the patients' own.

    Depends on the code and the plan alone, never on a patient.

    Raises:
        ValueError: a layer that couples patients or draws from a global generator, a tied parameter, or `parameters` that are not
            exactly the objective's trainable ones.
    """
    for name, module in objective.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or (norm and module.track_running_stats):
            raise ValueError(f"layer {name!r} ({type(module).__name__}) keeps statistics over a batch, which couples patients")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"layer {name!r} ({type(module).__name__}) draws from torch's global generator")
    own = {name: parameter for name, parameter in objective.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    if not own or set(own) != set(parameters):
        raise ValueError(f"parameters must be the objective's trainable ones; they differ in {sorted(set(own) ^ set(parameters))[:5]}")
    seen: dict[tuple[int, int], str] = {}
    for name, parameter in parameters.items():
        if parameter is not own[name]:
            raise ValueError(f"parameter {name!r} is not the objective's own")
        if not parameter.is_floating_point():
            raise ValueError(f"parameter {name!r} must be floating point, got {parameter.dtype}")
        # Where its numbers lie names a parameter: a tied one lies in the same place under two names.
        place = (id(parameter), 0) if parameter.numel() == 0 else (parameter.data_ptr(), 1)
        if place in seen:
            raise ValueError(f"parameters {seen[place]!r} and {name!r} are tied")
        seen[place] = name


class Engine(Protocol):
    """Adds patients' clipped gradients to the sum."""

    #: How many patients `add` wants at once.
    patients: int

    def add(self, patients: Sequence[PatientTiles], total: JointSum, /) -> list[str | None]:
        """Add each patient's vector; for each, why that patient contributes zero, or None. Never raises for what a patient causes."""
        ...

    def rehearse(self, patients: Sequence[PatientTiles], /) -> None:
        """Do all that `add` does with public synthetic patients, up to adding, and raise what `add` would keep to itself.

        Raises:
            NotContributed: a loss or gradient is not finite, or a buffer or parameter changed.
            EngineUnfitError: this engine's gradients are not this objective's.
            RuntimeError: torch's, such as want of memory.
        """
        ...
