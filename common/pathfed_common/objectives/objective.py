"""What every self-supervised objective offers, so that the private step can train it without knowing which one it is.

An objective is one file here: an `ObjectiveModule` (its state dict is the base state). To add one: write the file, give it a section in
`pathfed_common.plan`, add its line to the table in `pathfed_common.model`, and a row to the table of `tests/support/objectives.py`, so that
the tests of what holds for every objective, the removal test first, run on it.

**An objective MUST NOT mix patients.** Whatever it averages, centres or compares lies within one patient's tiles: the gradient of a
patient's loss is then that patient's own, and clipping it bounds the patient's influence.

Legend of shape suffixes: N tiles, C channels, H and W pixels, P patients.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from pathfed_common.encoder.spec import EncoderSpec

#: What an objective drew for some tiles, by name. The first axis of every tensor is the tiles', so that it can be cut and joined with them.
Draws = Mapping[str, Tensor]


class Uniforms(Protocol):
    """A random source."""

    def uniforms(self, n: int, /) -> NDArray[np.float64]:
        """The next n numbers, uniform in [0, 1)."""
        ...


class Objective(Protocol):
    """A self-supervised objective; every one is a `torch.nn.Module` too."""

    #: Whether a patient's loss is the mean of its tiles' own losses, so that the tiles may be taken in parts.
    separable: ClassVar[bool]

    def draw(self, tiles: int, random: Uniforms, /) -> Draws:
        """All that is random for that many tiles of one patient, on the CPU. Uses no other random source."""
        ...

    def loss(self, tiles_NCHW: Tensor, draws: Draws, /) -> Tensor:
        """One patient's loss: a scalar, float32."""
        ...

    def patient_losses(self, tiles_NCHW: Tensor, draws: Draws, counts: Sequence[int], /) -> Tensor:
        """Several patients' losses, float32 (P,), each equal to `loss` of that patient alone.

        Args:
            tiles_NCHW: their tiles, one patient after the other.
            draws: what was drawn for each, joined in the same order.
            counts: tiles of each patient; at least 1 each, they add up to N.
        """
        ...


class ObjectiveModule(nn.Module, Objective):
    """A torch module that is an objective: what a plan's model is. State dict: ``encoder.``, ``head.`` and, never trained, ``teacher.``."""

    #: The encoder's shape.
    spec: EncoderSpec

    def pictures(self, tiles_NCHW: Tensor, draws: Draws) -> Mapping[str, NDArray[np.uint8]]:
        """What can be shown of the model at work on these tiles: captions to RGB pictures (N, H, W, 3), for people to look at."""
        raise NotImplementedError
