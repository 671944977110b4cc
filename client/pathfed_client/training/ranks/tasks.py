"""What a site's process tells its ranks, and what they answer. Values that travel over a private socket, never over a network.

The order of a round, the same for every rank: `Begin`, then for each step `Patient` as often as patients were drawn, and `EndStep`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from pathfed_client.training.augmentation import Augmentation
from pathfed_client.training.compute import Compute
from pathfed_client.training.private_step import ReleasedFigures
from pathfed_common.privacy.mechanism import PatientMechanism

#: Sharded: all ranks share one patient's tiles and one copy of the model. Replicated: each has a copy, and patients of its own.
Mode = Literal["sharded", "replicated"]


@dataclass(frozen=True, kw_only=True)
class Join:
    """Become a rank.

    Attributes:
        rank: which one, from 0.
        ranks: how many there are.
        mode: how they share the work.
        device: where this one computes, such as "cpu" or "cuda:1".
        memory_bytes: the most it may take of a GPU's memory; None: all.
        threads: CPU threads.
        store: path of a file, in a folder of our own, by which they find each other.
        timeout_s: seconds a collective operation may take.
        compute: how passes are run; the engine is decided.
        tiles_at_once: tiles a rank takes in one pass at most; None: all it has of a patient.
        tile_px: side of a tile, pixels.
        tiles_per_patient: k.
        build: makes the objective, on the CPU; a function of an installed module, or a `functools.partial` of one.
    """

    rank: int
    ranks: int
    mode: Mode
    device: str
    memory_bytes: int | None
    threads: int
    store: str
    timeout_s: float
    compute: Compute
    tiles_at_once: int | None
    tile_px: int
    tiles_per_patient: int
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class Try:
    """Train on the public synthetic tiles from the base state in the shared memory."""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Start a round from the base state in the shared memory.

    Attributes:
        mechanism: the public constants of a step.
        augmentation: how tiles are changed.
        steps: private steps.
        local_learning_rate: step size of the local SGD when there are several.
        context: everything the release depends on.
        secret: keys the randomness together with it.
    """

    mechanism: PatientMechanism
    augmentation: Augmentation
    steps: int
    local_learning_rate: float
    context: Mapping[str, str | int] = field(repr=False)
    secret: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Patient:
    """Add a drawn patient to the step's sum.

    Attributes:
        slot: where the tiles lie in the shared memory.
        tiles: how many there are, at least 1.
        pseudonym: keys the draws.
    """

    slot: int
    tiles: int
    pseudonym: str = field(repr=False)


@dataclass(frozen=True)
class EndStep:
    """Add the noise; after the last step write the update into the shared memory."""


@dataclass(frozen=True)
class Done:
    """A task was done. `failure`: why a patient contributes zero, or why the base state cannot be trained."""

    failure: str | None = None


@dataclass(frozen=True)
class StepDone:
    """A step was released; every rank has the same figures."""

    figures: ReleasedFigures


@dataclass(frozen=True)
class Failed:
    """A task failed in a way that leaves the ranks out of step. The type of the error alone: its text could name a slide."""

    error: str
    out_of_memory: bool


Task = Join | Try | Begin | Patient | EndStep
Outcome = Done | StepDone | Failed
