"""The few collective operations a step over several processes needs, as one value.

A *rank* is one of R processes that compute a round together, one to a GPU. Numbers that decide something (was a patient readable, how long
is the gradient) are gathered and added up in the order of the ranks, in fp64 and on the CPU, so that every rank holds the same bits and
decides alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(Protocol):
    """The processes that compute a round together, as one of them sees them."""

    @property
    def rank(self) -> int:
        """This process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are (R)."""
        ...

    def every(self, values: Sequence[float], /) -> Tensor:
        """What each rank gave here: float64 (R, len(values)), on the CPU, the same bits on all ranks."""
        ...

    def total(self, values: Tensor, /) -> Tensor:
        """The sum over ranks of equally shaped tensors, added in the order of the ranks: the same bits on all ranks."""
        ...

    def total_of(self, values: Tensor, to: int, /) -> Tensor | None:
        """The same sum on rank `to` alone; None on the others."""
        ...


@dataclass(frozen=True)
class ProcessRanks:
    """The ranks of torch's default process group, which must reduce tensors of the CPU as well as those of `device`.

    Attributes:
        device: where this rank's tensors lie.
    """

    device: torch.device

    @property
    def rank(self) -> int:
        """See `Ranks`."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """See `Ranks`."""
        return dist.get_world_size()

    def every(self, values: Sequence[float], /) -> Tensor:
        """See `Ranks`."""
        own = torch.tensor([float(value) for value in values], dtype=torch.float64)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.stack(parts)

    def total(self, values: Tensor, /) -> Tensor:
        """See `Ranks`."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return _sum(parts)

    def total_of(self, values: Tensor, to: int, /) -> Tensor | None:
        """See `Ranks`."""
        parts = [torch.empty_like(values) for _ in range(self.size)] if self.rank == to else None
        dist.gather(values.contiguous(), parts, dst=to)
        return None if parts is None else _sum(parts)


class AcrossRanks:
    """The parts of a patient's tiles on the other ranks (`pathfed_common.objectives.across.Across`)."""

    def __init__(self, ranks: Ranks) -> None:
        """The parts are the ranks'."""
        self._ranks = ranks

    def place(self, rows: int, /) -> tuple[int, int]:
        """See `Across`."""
        counts = self._counts(rows)
        return sum(counts[: self._ranks.rank]), sum(counts)

    def sum(self, values: Tensor, /) -> Tensor:
        """See `Across`."""
        return self._ranks.total(values.detach())

    def gather(self, rows: Tensor, /) -> Tensor:
        """See `Across`."""
        gathered: Tensor = _Gather.apply(rows, self._ranks, self._counts(len(rows)))  # type: ignore[no-untyped-call]
        return gathered

    def _counts(self, rows: int) -> list[int]:
        return [int(count) for count in self._ranks.every([rows])[:, 0]]


class _Gather(torch.autograd.Function):
    """All ranks' rows, and on the way back the gradient of one's own, summed over the ranks.

    Each rank lays its rows into a field of zeros that has room for all; the sum of the fields, in the order of the ranks, is exact.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, counts: list[int]) -> Tensor:
        start = sum(counts[: ranks.rank])
        ctx.ranks, ctx.own = ranks, slice(start, start + len(rows))
        field = rows.new_zeros((sum(counts), *rows.shape[1:]))
        field[ctx.own] = rows
        return ranks.total(field)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return ctx.ranks.total(gradient)[ctx.own], None, None


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, from the first to the last; the first is overwritten."""
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total
