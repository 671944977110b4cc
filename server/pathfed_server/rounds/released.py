"""The encoder that a run releases, as its one canonical file, block by block: the last state's, its teacher's, or the running average.

A plan with `server_optimiser.ema` releases the average, which lies in the optimiser's file (`server_step`). What is not trained is its own
average. Every round's record names the digest of the average's file, so that a released one is bound to its run; who has the updates
computes it again (`replay`).
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pathfed_common import digest, model
from pathfed_common.digest import Digest
from pathfed_common.encoder.blocks import FileBlocks, block_chunks
from pathfed_common.plan import Plan
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
    prefix = model.released_prefix(plan)
    states, averages = FileBlocks(state), FileBlocks(optimiser) if plan.server_optimiser.ema else None
    shapes = {name.removeprefix(prefix): shape for name, shape in states.shapes.items() if name.startswith(prefix)}

    def block(name: str, start: int, stop: int) -> Tensor:
        averaged = f"{AVERAGE}.{prefix}{name}"
        if averages is not None and averaged in averages.shapes:
            return averages.read(averaged, start, stop)
        return states.read(prefix + name, start, stop)

    return block_chunks({name: (torch.float32, shape) for name, shape in shapes.items()}, block, {"format": "pt"})


def average_digest(plan: Plan, *, state: Path, optimiser: Path) -> Digest | None:
    """Digest of that file where the plan releases the average; None for any other plan, whose record needs none."""
    if not plan.server_optimiser.ema:
        return None
    return digest.of_chunks(released_chunks(plan, state=state, optimiser=optimiser))
