"""A teacher's distributions over prototypes, kept from collapsing by statistics over one patient's rows.

Published recipes take these statistics over a batch, and the centre over past batches too. Here they are **one patient's alone**: there is
no running centre, which would carry one patient's tiles into another's loss.

With a single row there is nothing to hold it against: it becomes a plain softmax. So it does, by the caller's doing, for class tokens of a
patient with a single tile: centred on each other, the crops of one tile would keep just what tells them apart, the opposite of what
they are to teach.

Legend of shape suffixes: B rows, K prototypes.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from pathfed_common.objectives.across import ALONE, Across

#: (logits (B, K), temperature, parts of the patient) -> probabilities (B, K).
Centring = Callable[[Tensor, float, Across], Tensor]

_ROUNDS = 3
#: A prototype's mass is at least this, so that one that no row likes divides nothing by zero. float32 goes down to 1e-38.
_LEAST_MASS = 1e-30


def plain(logits_BK: Tensor, temperature: float, across: Across = ALONE) -> Tensor:
    """Softmax, row by row."""
    return functional.softmax(logits_BK / temperature, dim=-1)


def centred(logits_BK: Tensor, temperature: float, across: Across = ALONE) -> Tensor:
    """Softmax of the logits less their mean over the patient's rows (Caron et al. 2021, arXiv:2104.14294, section 3.1, without memory)."""
    _, rows = across.place(len(logits_BK))
    if rows == 1:
        return plain(logits_BK, temperature)
    centre_K = across.sum(logits_BK.sum(0)) / rows
    return plain(logits_BK - centre_K, temperature)


def sinkhorn(logits_BK: Tensor, temperature: float, across: Across = ALONE, *, rounds: int = _ROUNDS) -> Tensor:
    """Some rounds of Sinkhorn-Knopp over the patient's rows (Caron et al. 2020, arXiv:2006.09882, section 3.2 and appendix A).

    Rows and prototypes are scaled in turn, so that every row has mass 1 and every prototype the same mass; rows come last and are exact.
    In logarithms, and starting from the rows' own softmax, which changes nothing in the limit: no exponential overflows.
    """
    _, rows = across.place(len(logits_BK))
    if rows == 1:
        return plain(logits_BK, temperature)
    log_BK = functional.log_softmax(logits_BK / temperature, dim=-1)
    for _ in range(rounds):
        mass_K = across.sum(log_BK.exp().sum(0)).clamp(min=_LEAST_MASS)
        log_BK = functional.log_softmax(log_BK - mass_K.log(), dim=-1)
    return log_BK.exp()


CENTRINGS: Final[dict[str, Centring]] = {"softmax": centred, "sinkhorn": sinkhorn}


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """- sum_k targets log softmax(logits / temperature) over the last axis."""
    return -(targets * functional.log_softmax(logits / temperature, dim=-1)).sum(-1)


def targets(centring: Centring, logits: Tensor, temperature: float, across: Across, *, alone: bool = False) -> Tensor:
    """The teacher's probabilities for logits (..., K), all of whose leading axes are one patient's rows; never with a gradient.

    `alone`: the rows are of one tile and not to be held against each other.
    """
    with torch.no_grad():
        rows_BK = logits.detach().flatten(0, -2)
        made = plain(rows_BK, temperature) if alone else centring(rows_BK, temperature, across)
        return made.view_as(logits)
