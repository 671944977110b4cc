"""Statistics over one patient's tiles, wherever the tiles lie: in one process, or in parts on several GPUs of a site.

An objective that compares or averages a patient's tiles reaches the tiles it does not hold through `Across`, and through nothing else.
**The parts are always of one patient.** Each process then computes its part's *share* of the patient's loss:

    sum over the parts of `loss`  =  the patient's loss          (the same holds for the gradients)

so gradients are to be summed over the processes, not averaged. One that averages them (FSDP's default) multiplies by their number.

Every member may be a collective operation: all processes come to the same calls in the same order, since nothing an objective does depends
on the numbers in a tensor. A part may be empty.
"""

from typing import Final, Protocol

import torch
from torch import Tensor


class Across(Protocol):
    """The other parts of the patient's tiles."""

    def place(self, rows: int, /) -> tuple[int, int]:
        """Where this part's `rows` rows lie among those of all parts: (index of the first, rows of all parts together)."""
        ...

    def sum(self, values: Tensor, /) -> Tensor:
        """The sum over all parts of a tensor that each part has in the same shape. Carries no gradient."""
        ...

    def gather(self, rows: Tensor, /) -> Tensor:
        """The rows of all parts, part by part along the first axis.

        The backward brings each part the gradients of its rows, summed over all parts.
        """
        ...


class _Alone:
    def place(self, rows: int, /) -> tuple[int, int]:
        return 0, rows

    def sum(self, values: Tensor, /) -> Tensor:
        return values.detach()

    def gather(self, rows: Tensor, /) -> Tensor:
        return rows


#: All of the patient's tiles are here.
ALONE: Final[Across] = _Alone()


def fine(values: Tensor) -> Tensor:
    """In the type statistics are computed in: float32, whatever autocast says, or float64 for float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
