"""How the forward pass of a microbatch is run: number type, checkpointed blocks, compiled or not.

A pass of exactly the compiled number of tiles is compiled, any other is not: what runs depends on the number of tiles alone, never on what
came before, and nothing is compiled in the middle of a round that was not compiled when the base state was tried.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from pathfed_client.training.compute import Compute
from pathfed_common.objectives.objective import Draws

#: The compiler behind torch.compile.
BACKEND = "inductor"


class Passes:
    """Forward passes of one objective."""

    def __init__(self, objective: nn.Module, compute: Compute, *, tiles: int | None = None) -> None:
        """Run `objective` as `compute` says; passes of `tiles` tiles are compiled where it asks for that."""
        self._objective, self._compute = objective, compute
        self._tiles = tiles if compute.compile else None
        self._compiled: dict[str, Callable[..., Tensor]] = {}

    def loss(self, tiles_NCHW: Tensor, draws: Draws, *, checkpointing: bool = False) -> Tensor:
        """One patient's loss, a scalar; `checkpointing` as well where the plan does not ask for it."""
        return self._run("loss", checkpointing, tiles_NCHW, draws)

    def patient_losses(self, tiles_NCHW: Tensor, draws: Draws, counts: Sequence[int]) -> Tensor:
        """Several patients' losses, (P,)."""
        return self._run("patient_losses", False, tiles_NCHW, draws, tuple(counts))

    def _run(self, method: str, checkpointing: bool, tiles_NCHW: Tensor, *rest: Any) -> Tensor:
        compute = self._compute
        checkpointing = checkpointing or compute.activation_checkpointing
        with ExitStack() as stack:
            if compute.precision == "bfloat16":
                stack.enter_context(torch.autocast(tiles_NCHW.device.type, dtype=torch.bfloat16))
            if checkpointing:
                stack.enter_context(checkpointed(self._objective))
            compiled = self._tiles is not None and len(tiles_NCHW) == self._tiles and checkpointing == compute.activation_checkpointing
            function = self._compiled_method(method) if compiled else getattr(self._objective, method)
            if compiled:
                # Merging equal operations would merge the notes of equal uses of a layer, and lose one (`engines.taps`).
                stack.enter_context(functorch.patch(cse=False))
            loss: Tensor = function(tiles_NCHW, *rest)
        return loss

    def _compiled_method(self, method: str) -> Callable[..., Tensor]:
        if method not in self._compiled:
            # Static shapes: torch would otherwise make the second graph of another shape a dynamic one, with other bits.
            self._compiled[method] = torch.compile(getattr(self._objective, method), dynamic=False, backend=BACKEND)
        return self._compiled[method]


def can_checkpoint(objective: nn.Module) -> bool:
    """Whether the objective has blocks that can be checkpointed."""
    return any(hasattr(module, "checkpoint_blocks") for module in objective.modules())


@contextmanager
def checkpointed(objective: nn.Module) -> Iterator[None]:
    """Checkpoint every block inside the block, and leave the objective as it was (`VisionTransformer.checkpoint_blocks`)."""
    found: list[Any] = [module for module in objective.modules() if hasattr(module, "checkpoint_blocks")]
    before = [module.activation_checkpointing for module in found]
    try:
        for module in found:
            module.checkpoint_blocks(True)
        yield
    finally:
        for module, on in zip(found, before, strict=True):
            module.checkpoint_blocks(on)
