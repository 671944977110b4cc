"""The server's part of a round by number of sites: peak memory and throughput, beside Flower's FedAvg and a memory copy.

Every measurement is a process of its own (`_aggregation_side.py`); the sides take turns. Our side reads update files, writes aggregate,
optimiser and state, flushed to the disk. Flower's has the replies in memory, as its strategy is given them, and writes nothing; reading
them is not timed. A figure in GB/s is bytes of updates over the seconds of the aggregation. One thread each.

    --quick        an encoder of 40 MB
    (full)         400 MB; 2, 8 and 32 sites, the robust rules with 8, Flower with 2 and 8
    --megabytes    another size; above 1,000 MB with 3 sites alone, and without Flower
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks._aggregation_side import FILES
from tests.benchmarks._harness import Target, arguments, end_on_terminate, finish, interleaved, machine, tell

from pathfed_common.encoder import weights
from pathfed_common.files import write_atomic

_LARGE_MB = 1000
Found = dict[str, float]
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def shapes(megabytes: int) -> dict[str, tuple[int, ...]]:
    """Tensors of so many MB in all: one with a quarter of the numbers, and twelve equal ones."""
    numbers = megabytes * 250_000
    small = numbers // 16
    return {"encoder.large": (numbers // 4,), **{f"encoder.block-{index:02d}": (small,) for index in range(12)}}


def write_files(folder: Path, megabytes: int, files: int) -> None:
    """A state, and updates that differ."""
    layout = {name: (torch.float32, shape) for name, shape in shapes(megabytes).items()}
    for number, name in enumerate(("state", *(f"update-{index}" for index in range(files)))):
        drawn = partial(_drawn, np.random.default_rng(number), layout)
        write_atomic(folder / name, weights.chunks(layout, drawn, {}))


def _drawn(random: np.random.Generator, layout: Layout, name: str) -> torch.Tensor:
    return torch.from_numpy(random.random(layout[name][1], np.float32) - np.float32(0.5))


def measured(folder: Path, *call: object) -> Callable[[int], Sequence[Found]]:
    """A measurement of a side, in a process of its own."""

    def measure(_: int) -> Sequence[Found]:
        command = [sys.executable, str(Path(__file__).with_name("_aggregation_side.py")), str(folder), *map(str, call)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
        return [json.loads(done.stdout.splitlines()[-1])]

    return measure


def sides_of(folder: Path, megabytes: int) -> dict[str, Callable[[int], Sequence[Found]]]:
    """Every side, by its name in the figures."""
    if megabytes > _LARGE_MB:
        return {"mean_3": measured(folder, "rounds", "mean", 3), "copy_3": measured(folder, "copy", 3)}
    ours = {f"mean_{sites}": measured(folder, "rounds", "mean", sites) for sites in (2, 8, 32)}
    rules = {f"{rule}_8": measured(folder, "rounds", rule, 8) for rule in ("trimmed_mean", "norm_weighted")}
    flower = {f"flower_{sites}": measured(folder, "flower", sites) for sites in (2, 8)}
    return {**ours, **rules, **flower, "copy_8": measured(folder, "copy", 8)}


def figures_of(found: dict[str, list[list[Found]]], megabytes: int) -> dict[str, Any]:
    """Medians over the blocks: MB above the interpreter, GB/s, seconds of the step; and ratios."""
    made: dict[str, Any] = {}
    for name, blocks in found.items():
        runs = [run for block in blocks for run in block]
        made[f"{name}_peak_mb"] = round(statistics.median(run["peak_mb"] for run in runs), 1)
        made[f"{name}_gb_s"] = round(statistics.median(run["bytes"] / run["aggregate_s"] for run in runs) / 1e9, 3)
        if "step_s" in runs[0]:
            made[f"{name}_aggregate_s"] = round(statistics.median(run["aggregate_s"] for run in runs), 2)
            made[f"{name}_step_s"] = round(statistics.median(run["step_s"] for run in runs), 2)
    made["peak_to_encoder"] = round(
        max(value for name, value in made.items() if name.startswith("mean_") and "peak" in name) / megabytes, 4
    )
    if "mean_32" in found:
        made["peak_32_to_2"] = round(made["mean_32_peak_mb"] / made["mean_2_peak_mb"], 3)
        made["flower_peak_to_encoder"] = round(made["flower_8_peak_mb"] / megabytes, 1)
        made["speed_to_flower"] = round(made["mean_8_gb_s"] / made["flower_8_gb_s"], 2)
        made["speed_to_copy"] = round(made["mean_8_gb_s"] / made["copy_8_gb_s"], 3)
    return made


def main() -> int:
    """Measure, and print the figures."""
    end_on_terminate()
    given = arguments(__doc__, ("--megabytes", {"type": int, "default": None}), ("--blocks", {"type": int, "default": None}))
    megabytes = given.megabytes or (40 if given.quick else 400)
    with tempfile.TemporaryDirectory(prefix="pathfed-aggregation-") as place:
        folder = Path(place)
        write_files(folder, megabytes, 3 if megabytes > _LARGE_MB else FILES)
        found = interleaved(sides_of(folder, megabytes), given.blocks or (1 if given.quick else 3), tell)
    figures = {"encoder_mb": megabytes, **figures_of(found, megabytes), **machine()}
    targets = {"peak_to_encoder": Target("<=", 2.0)}
    if "peak_32_to_2" in figures:
        targets["peak_32_to_2"] = Target("<=", 1.1)
    return finish("aggregation_memory", figures, targets)


if __name__ == "__main__":
    sys.exit(main())
