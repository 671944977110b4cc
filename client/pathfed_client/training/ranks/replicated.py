"""Replicated: every rank has a whole copy of the model and takes drawn patients r, r + R, r + 2R, ...

Each rank sums its own patients' clipped vectors. At the end of a step the partial sums are added up; each rank takes an even run of every
parameter, adds that run's noise, and writes it where all can read it. Sums are whole numbers, so that the result is a single process's, bit
for bit, whatever R is, where each computes a patient's gradient to the same bits (one kind of device, one number of threads).
"""

from torch import Tensor

from pathfed_client.training.joint_sum import JointSum
from pathfed_client.training.ranks.group import Ranks
from pathfed_client.training.ranks.shards import Piece, even_run


def joined(total: JointSum, ranks: Ranks) -> dict[str, Piece]:
    """Add the ranks' partial sums, figures included, and keep this rank's run of each parameter. The partial sum becomes useless.

    Args:
        total: this rank's partial sum; afterwards its figures are those of all ranks, and its integers are used up.
        ranks: this process among the others.

    Returns:
        The whole sum's integers from `Piece.start` on, by parameter.
    """
    # Whole numbers below 2^53, which float64 holds.
    told = ranks.every([total.loss_units, total.patients])
    total.loss_units, total.patients = int(told[:, 0].sum()), int(told[:, 1].sum())
    return {name: _own_run(integers.view(-1), ranks) for name, integers in sorted(total.integers.items())}


def _own_run(flat: Tensor, ranks: Ranks) -> Piece:
    own: Tensor = flat[:0]
    start, _ = even_run(flat.numel(), ranks.rank, ranks.size)
    for owner in range(ranks.size):
        first, last = even_run(flat.numel(), owner, ranks.size)
        summed = ranks.total_of(flat[first:last], owner) if first < last else None
        own = own if summed is None else summed
    return Piece(own, start, whole=False)
