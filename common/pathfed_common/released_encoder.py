"""The encoder that a plan releases, read from a state: the trained one or its teacher, with its adapters merged into the weights."""

from collections.abc import Mapping
from math import prod

from torch import Tensor

from pathfed_common import model
from pathfed_common.encoder import adapters as lora
from pathfed_common.encoder.blocks import BlockReader
from pathfed_common.encoder.weights import Shape
from pathfed_common.plan import Plan


class ReleasedEncoder:
    """Implements `BlockReader`: the released encoder's tensors by timm's names."""

    def __init__(self, plan: Plan, state: BlockReader) -> None:
        """Read from a base state.

        Args:
            plan: the plan.
            state: the state's tensors by their own names.
        """
        self._state, self._prefix, self._adapters = state, model.released_prefix(plan), model.adapters_of(plan)
        named = ((name.removeprefix(self._prefix), shape) for name, shape in state.shapes.items() if name.startswith(self._prefix))
        self._shapes = {name: shape for name, shape in named if not lora.is_adapter(name)}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """See `BlockReader.shapes`."""
        return self._shapes

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See `BlockReader.read`."""
        values = self._state.read(self._prefix + name, start, stop)
        matrices = None if self._adapters is None else lora.matrices_of(name, self._adapters)
        if self._adapters is None or matrices is None:
            return values
        (outputs, inputs), rank = self._shapes[name], self._adapters.rank
        a, b = self._whole(matrices[0], (rank, inputs)), self._whole(matrices[1], (outputs, rank))
        return lora.merged(values, a, b, self._adapters.scale, start=start)

    def _whole(self, name: str, shape: Shape) -> Tensor:
        return self._state.read(self._prefix + name, 0, prod(shape)).view(shape)
