"""Noise: normals a second of the cryptographic generator beside torch.randn, on the same device with the same threads.

Sides, measured in turn, a millisecond or so each, so that other work on the machine falls on all of them:

    ours            `KeyedRandom.normal_range`: AES-256-CTR, fp64, one piece of 2^17 normals at a time, a new tensor each
    randn           `torch.randn(out=...)` in fp32 into one buffer of the same length: its fastest form
    ours, added     `KeyedRandom.add_normals` to 2^20 fp32 numbers: generation, sum in fp64, rounding to the grid and to fp32
    randn, added    `values.add_(torch.randn(...))`: fp32 throughout

With one thread on a CPU, seconds are its CPU time. Elsewhere they are wall time: on a busy machine each of two threads waits for the
other's turn, so that figures for two mean something on a quiet machine only. Rates are of the fastest tenth of the samples, on both sides
alike; the ratios of medians stand beside them. `ratio_1` and `ratio_2` are ours to randn with one and with two threads.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks._harness import Target, arguments, finish, interleaved, machine, tell

from pathfed_common.privacy.randomness import KeyedRandom

PIECE, TENSOR = 1 << 17, 1 << 20
#: Each side's normals a call.
_SIDES = {"ours": PIECE, "randn": PIECE, "ours_added": TENSOR, "randn_added": TENSOR}


def main() -> int:
    """Measure with one and with two threads; exit status 0 if both ratios are met."""
    options = arguments(__doc__, ("--device", {"default": "cpu", "help": "where normals are computed, such as cuda:0"}))
    figures: dict[str, Any] = {"machine": machine(), "device": options.device}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds = _seconds(options)
        rates = {name: _SIDES[name] / statistics.quantiles(found, n=10)[0] / 1e6 for name, found in seconds.items()}
        medians = {name: _SIDES[name] / statistics.median(found) for name, found in seconds.items()}
        tell(f"{threads} threads: " + ", ".join(f"{name} {rate:.0f} M/s" for name, rate in rates.items()))
        figures |= {f"{name}_{threads}": round(rate, 1) for name, rate in rates.items()}
        figures[f"ratio_{threads}"] = round(rates["ours"] / rates["randn"], 3)
        figures[f"added_ratio_{threads}"] = round(rates["ours_added"] / rates["randn_added"], 3)
        figures[f"median_ratio_{threads}"] = round(medians["ours"] / medians["randn"], 3)
    figures["microseconds_of_2_normals"] = round(_seconds_of_a_small_draw() * 1e6, 1)
    return finish("noise", figures, {"ratio_1": Target(">=", 0.5), "ratio_2": Target(">=", 0.5)})


def _seconds(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each sample of each side."""
    device = torch.device(options.device)
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    generator = torch.Generator(device).manual_seed(0)
    random = KeyedRandom(bytes(32), {"purpose": "benchmark"})
    stream = random.normal_range(0, 1 << 50, chunk=PIECE, device=device)
    buffer = torch.empty(PIECE, device=device)
    values = torch.zeros(TENSOR, device=device)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: next(stream),
        "randn": lambda: torch.randn(PIECE, out=buffer, generator=generator),
        "ours_added": lambda: random.add_normals(values, 1.0),
        "randn_added": lambda: values.add_(torch.randn(TENSOR, device=device, generator=generator)),
    }
    samples = {name: _sampler(call, device, clock, 3 if _SIDES[name] == TENSOR else 12) for name, call in calls.items()}
    found = interleaved(samples, 12 if options.quick else 60, lambda _: None)
    # The first block warms up.
    return {name: [second for block in blocks[1:] for second in block] for name, blocks in found.items()}


def _sampler(
    call: Callable[[], object], device: torch.device, clock: Callable[[], float], repeats: int
) -> Callable[[int], Sequence[float]]:
    def sample(_: int) -> list[float]:
        seconds = []
        for _ in range(repeats):
            began = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(clock() - began)
        return seconds

    return sample


def _seconds_of_a_small_draw() -> float:
    random, seconds = KeyedRandom(bytes(32), {}), []
    for _ in range(300):
        began = time.perf_counter()
        next(random.normal_range(0, 2))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
