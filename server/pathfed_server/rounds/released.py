"""The encoder that a run releases, as its one canonical file, block by block: the last state's, its teacher's, or the running average.

A plan with `server_optimiser.ema` releases the average, which lies in the optimiser's file (`server_step`). What is not trained is its own
average; of adapters each matrix is averaged by itself, and then they are merged. Every round's record names the digest of the average's
file, so that a released one is bound to its run; who has the updates computes it again (`replay`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.encoder.blocks import BlockReader, FileBlocks, block_chunks
from pathfed_common.encoder.weights import Shape
from pathfed_common.plan import Plan
from pathfed_common.released_encoder import ReleasedEncoder
from pathfed_server.rounds.server_step import AVERAGE


def released_chunks(plan: Plan, *, state: Path, optimiser: Path) -> Iterator[bytes]:
    """The file that is released if the run ends with this round, in pieces: `weights.encoder_chunks` of the encoder.

    Args:
        plan: the run's plan.
        state: the state after the round.
        optimiser: the optimiser's file after the round; read where the plan releases the average.

    Raises:
        ValueError: the files are not those of the plan.
    """
    last: BlockReader = _Averaged(FileBlocks(state), FileBlocks(optimiser)) if plan.server_optimiser.ema else FileBlocks(state)
    encoder = ReleasedEncoder(plan, last)
    return block_chunks({name: (torch.float32, shape) for name, shape in encoder.shapes.items()}, encoder.read, {"format": "pt"})


@dataclass(frozen=True)
class _Averaged:
    """Implements `BlockReader`: a state with the running averages in the place of what is averaged."""

    state: BlockReader
    optimiser: BlockReader

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """See `BlockReader.shapes`."""
        return self.state.shapes

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See `BlockReader.read`."""
        averaged = f"{AVERAGE}.{name}"
        return self.optimiser.read(averaged, start, stop) if averaged in self.optimiser.shapes else self.state.read(name, start, stop)


def average_digest(plan: Plan, *, state: Path, optimiser: Path) -> Digest | None:
    """Digest of that file where the plan releases the average; None for any other plan, whose record needs none."""
    if not plan.server_optimiser.ema:
        return None
    return digest.of_chunks(released_chunks(plan, state=state, optimiser=optimiser))
