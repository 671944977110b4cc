"""What a pass must leave alone: the objective's parameters, frozen ones too, and its buffers.

A pass that changes one would carry something of a patient into the next patient's gradient. Changes are found by torch's own version
counters, which cost nothing; what writes through `.data` escapes them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pathfed_client.training.engines.engine import NotContributed


class StateGuard:
    """Watches one objective. Copies of its buffers are made when it is first used and when the state was loaded anew, not every pass."""

    def __init__(self, objective: nn.Module) -> None:
        """Watch `objective`, whose modules stay the same."""
        modules = list(objective.modules())
        self._parameters = list(objective.parameters())
        self._places = [(module._buffers, name) for module in modules for name, buffer in module._buffers.items() if buffer is not None]
        self._buffers: list[Tensor] = []
        self._versions: list[int] = []
        self._copies: list[Tensor] = []

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Put back buffers that change inside the block, and then refuse.

        Raises:
            NotContributed: a buffer was written to or replaced, or a parameter was written to.
        """
        self._note_buffers()
        before = [parameter._version for parameter in self._parameters]
        buffers_changed = False
        try:
            yield
        finally:
            buffers_changed = self._put_back()
        if buffers_changed:
            raise NotContributed("a buffer changed during the forward pass, which would couple patients")
        if before != [parameter._version for parameter in self._parameters]:
            raise NotContributed("a parameter changed during the forward pass, which would couple patients")

    def _note_buffers(self) -> None:
        """Copy the buffers, unless they are those copied before."""
        now = [owner[name] for owner, name in self._places]
        buffers = [buffer for buffer in now if buffer is not None]
        versions = [buffer._version for buffer in buffers]
        same = len(buffers) == len(self._buffers) and all(a is b for a, b in zip(buffers, self._buffers, strict=True))
        if not same or versions != self._versions:
            self._buffers, self._versions = buffers, versions
            self._copies = [buffer.detach().clone() for buffer in buffers]

    def _put_back(self) -> bool:
        changed = False
        for index, (owner, name) in enumerate(self._places):
            buffer = self._buffers[index]
            if owner[name] is not buffer or buffer._version != self._versions[index]:
                changed = True
                with torch.no_grad():
                    buffer.copy_(self._copies[index])
                owner[name] = buffer
                self._versions[index] = buffer._version
        return changed


@contextmanager
def unchanged_buffers(objective: nn.Module) -> Iterator[None]:
    """`StateGuard.unchanged` for one pass.

    Raises:
        NotContributed: a buffer was written to or replaced, or a parameter was written to.
    """
    with StateGuard(objective).unchanged():
        yield
