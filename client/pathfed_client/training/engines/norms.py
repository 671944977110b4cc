"""Norms that do not come out too small.

Torch's own norm of a large fp32 tensor on the CPU adds squares up in fp32 and comes out up to 4e-3 too small at 5e7 numbers, which would
let a patient contribute more than C. Here pieces of 2^16 numbers are taken in fp32, where the error measured is below 1e-6, and joined in
fp64. Tensors of other types are taken in fp32, fp64 stays.

Legend of shape suffixes: P patients, n numbers.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

#: Numbers that are taken in one fp32 norm.
PIECE = 1 << 16
#: Tensors of fewer numbers are put together.
_SMALL = 1 << 13


def fine(tensor: Tensor) -> Tensor:
    """The tensor, detached, in fp32, or in fp64 where it is in fp64."""
    tensor = tensor.detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def joint_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all numbers of all tensors: fp64, a scalar on their device. Not finite if any number is not; never waits for a device."""
    pieces = _pieces(tensors)
    if not pieces:
        return torch.zeros((), dtype=torch.float64)
    norms: Sequence[Tensor] = torch._foreach_norm(pieces)
    joint: Tensor = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms] if _mixed(norms) else list(norms)).double())
    return joint


def squared_norms(numbers_Pn: Tensor) -> Tensor:
    """Squared L2 norm of each row: fp64 (P,)."""
    pieces = fine(numbers_Pn).split(PIECE, dim=1)
    return sum((torch.linalg.vector_norm(piece, dim=1).double().square() for piece in pieces), start=numbers_Pn.new_zeros(1).double())


def _pieces(tensors: Iterable[Tensor]) -> list[Tensor]:
    """All numbers, `PIECE` of them at most in each: large tensors cut, and small ones of one type put together, for calls cost time too."""
    pieces: list[Tensor] = []
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        flat, numbers = fine(tensor).reshape(-1), tensor.numel()
        if numbers < _SMALL:
            small.setdefault(flat.dtype, []).append(flat)
        elif numbers <= PIECE:
            pieces.append(flat)
        else:
            pieces += flat.split(PIECE)
    for alike in small.values():
        pieces += torch.cat(alike).split(PIECE)
    return pieces


def _mixed(norms: Sequence[Tensor]) -> bool:
    return any(norm.dtype != norms[0].dtype for norm in norms)
