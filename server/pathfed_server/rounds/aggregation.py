"""The admitted updates of a round become one, block by block, straight from their files to a file.

    mean            (w_1 u_1 + ... + w_n u_n) / (w_1 + ... + w_n), number by number, w the sites' public weights
    trimmed_mean    the same of what is left of each number's values without the largest and the smallest (`robust.trimmed_mean`)
    norm_weighted   the mean, each weight multiplied by a factor that the update's norm gives (`robust.norm_factors`)

Guarantees:
    - The result does not depend, in any bit, on the order of arrival, the size of blocks, threads or the machine: sums are taken in order
      of the site names, or, by the trimmed mean, of the values.
    - Sums are formed in float64 and rounded to float32 once. A product of two 24-bit numbers and sums of many float32 of like size are
      exact or nearly so there, and with one block at a time in memory the wider type costs nothing that counts.
    - Multiplying and adding are separate operations: a fused one rounds differently, and not every processor fuses.
    - Memory: one block of one site, and the sum, however large the tensors and however many the sites; the trimmed mean's is as much,
      with smaller blocks of all sites. One file is open at a time.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pathfed_common.encoder.blocks import BLOCK, BlockReader, block_chunks
from pathfed_common.files import write_atomic
from pathfed_common.ids import SiteName
from pathfed_common.plan import AggregationPlan
from pathfed_common.wire_format import open_update
from pathfed_server.rounds.norms import l2_norm
from pathfed_server.rounds.robust import norm_factors, trimmed_mean

#: Numbers that the trimmed mean holds of all sites together.
_TRIMMED_NUMBERS = 2**20


def shares(weights: Mapping[SiteName, float]) -> dict[SiteName, float]:
    """Each site's share in the mean, in site order; they add up to 1.

    Raises:
        ValueError: no site, or a weight that is not finite and above 0.
    """
    total = _total(weights)
    return {site: weights[site] / total for site in sorted(weights)}


def aggregate(
    rule: AggregationPlan, updates: Mapping[SiteName, Path], weights: Mapping[SiteName, float], out: Path, *, block: int = BLOCK
) -> dict[SiteName, float]:
    """Write what the rule makes of the update files, as float32 tensors of the same names.

    Args:
        rule: the plan's rule.
        updates: each site's update file; all hold the same names and shapes (admission has seen to it).
        weights: a public weight for each of these sites.
        out: the file to write; it is there whole or not at all.
        block: numbers in a block.

    Returns:
        What "norm_weighted" multiplied the sites' weights by, in site order; nothing with another rule.

    Raises:
        ValueError: the weights are not those of the updates' sites, or not above 0, the files' tensors differ, or trimming leaves nothing.
        HostError: the disk is full (PF901) or cannot be written (PF904).
    """
    if sorted(updates) != sorted(weights):
        raise ValueError(f"weights are for {sorted(weights)}, updates from {sorted(updates)}")
    _total(weights)
    readers = {site: open_update(updates[site]) for site in sorted(updates)}
    shapes = next(iter(readers.values())).shapes
    for site, reader in readers.items():
        if reader.shapes != shapes:
            raise ValueError(f"the update of {site} has other tensors than that of {min(readers)}")
    factors = norm_factors({site: l2_norm(reader) for site, reader in readers.items()}) if rule.rule == "norm_weighted" else {}
    if rule.rule == "trimmed_mean":
        combined, block = _trimmed(readers, weights, rule.trim), min(block, max(1, _TRIMMED_NUMBERS // len(readers)))
    else:
        combined = _mean(readers, {site: weights[site] * factors.get(site, 1.0) for site in readers})
    layout = {name: (torch.float32, shape) for name, shape in shapes.items()}
    write_atomic(out, block_chunks(layout, combined, {}, size=block))
    return factors


def _mean(readers: Mapping[SiteName, BlockReader], weights: Mapping[SiteName, float]) -> Callable[[str, int, int], Tensor]:
    total = math.fsum(weights.values())

    def mean(name: str, start: int, stop: int) -> Tensor:
        added = torch.zeros(stop - start, dtype=torch.float64)
        for site, reader in readers.items():
            added += reader.read(name, start, stop).to(torch.float64).mul_(weights[site])
        return added.div_(total).to(torch.float32)

    return mean


def _trimmed(readers: Mapping[SiteName, BlockReader], weights: Mapping[SiteName, float], trim: int) -> Callable[[str, int, int], Tensor]:
    in_order = [weights[site] for site in readers]

    def trimmed(name: str, start: int, stop: int) -> Tensor:
        return trimmed_mean(torch.stack([reader.read(name, start, stop) for reader in readers.values()]), in_order, trim)

    return trimmed


def _total(weights: Mapping[SiteName, float]) -> float:
    if not weights:
        raise ValueError("a mean needs at least one site")
    for site, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of {site} must be finite and above 0, got {weight}")
    return math.fsum(weights.values())
