"""The weighted mean of the admitted updates, block by block, straight from their files to a file.

Guarantees:
    - The result does not depend, in any bit, on the order of arrival, the size of blocks, threads or the machine: each number is
      (w_1 u_1 + ... + w_n u_n) / (w_1 + ... + w_n), taken in order of the site names.
    - Sums are formed in float64 and rounded to float32 once. A product of two 24-bit numbers and sums of many float32 of like size are
      exact or nearly so there, and with one block at a time in memory the wider type costs nothing that counts.
    - Multiplying and adding are separate operations: a fused one rounds differently, and not every processor fuses.
    - Memory: one block of one site, and the sum, however large the tensors and however many the sites. One file is open at a time.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pathfed_common.encoder.blocks import BLOCK, block_chunks
from pathfed_common.files import write_atomic
from pathfed_common.ids import SiteName
from pathfed_common.wire_format import open_update


def shares(weights: Mapping[SiteName, float]) -> dict[SiteName, float]:
    """Each site's share in the mean, in site order; they add up to 1.

    Raises:
        ValueError: no site, or a weight that is not finite and above 0.
    """
    total = _total(weights)
    return {site: weights[site] / total for site in sorted(weights)}


def average(updates: Mapping[SiteName, Path], weights: Mapping[SiteName, float], out: Path, *, block: int = BLOCK) -> None:
    """Write the weighted mean of the update files as float32 tensors of the same names.

    Args:
        updates: each site's update file; all hold the same names and shapes (admission has seen to it).
        weights: a public weight for each of these sites.
        out: the file to write; it is there whole or not at all.
        block: numbers in a block.

    Raises:
        ValueError: the weights are not those of the updates' sites, or not above 0, or the files' tensors differ.
        HostError: the disk is full (PF901) or cannot be written (PF904).
    """
    if sorted(updates) != sorted(weights):
        raise ValueError(f"weights are for {sorted(weights)}, updates from {sorted(updates)}")
    total = _total(weights)
    sites = sorted(updates)
    readers = {site: open_update(updates[site]) for site in sites}
    shapes = readers[sites[0]].shapes
    for site, reader in readers.items():
        if reader.shapes != shapes:
            raise ValueError(f"the update of {site} has other tensors than that of {sites[0]}")

    def mean(name: str, start: int, stop: int) -> Tensor:
        added = torch.zeros(stop - start, dtype=torch.float64)
        for site, reader in readers.items():
            added += reader.read(name, start, stop).to(torch.float64).mul_(weights[site])
        return added.div_(total).to(torch.float32)

    layout = {name: (torch.float32, shape) for name, shape in shapes.items()}
    write_atomic(out, block_chunks(layout, mean, {}, size=block))


def _total(weights: Mapping[SiteName, float]) -> float:
    if not weights:
        raise ValueError("a mean needs at least one site")
    for site, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of {site} must be finite and above 0, got {weight}")
    return math.fsum(weights.values())
