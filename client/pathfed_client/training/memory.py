"""Memory that runs out is found out before the charge: tiles a pass takes at once are halved until a try on synthetic tiles fits."""

from collections.abc import Callable

import torch

#: Words of allocators whose errors are plain RuntimeErrors.
_WORDS = ("out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or a GPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


class DoesNotFit(Exception):  # noqa: N818  an outcome, not a fault
    """Not even one tile at a time fits."""


def fit_microbatch(attempt: Callable[[int], None], tiles: int) -> int:
    """The most tiles a pass may take at once, of `tiles`, `tiles / 2`, ..., 1, so that an attempt does not run out of memory.

    Args:
        attempt: trains on public tiles, so many at once; whether it runs out of memory tells nothing of a patient.
        tiles: where to start.

    Raises:
        DoesNotFit: one tile at a time is too many.
        Exception: whatever else `attempt` raises.
    """
    at_once = tiles
    while True:
        try:
            attempt(at_once)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if at_once == 1:
                raise DoesNotFit(f"one tile at a time is too much: {type(error).__name__}") from error
        else:
            return at_once
        at_once = -(-at_once // 2)
