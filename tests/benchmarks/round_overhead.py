"""Seconds of a round beyond the slowest site's training: pathfed against Flower's own FedAvg and ClientApp processes.

    .venv/bin/python tests/benchmarks/round_overhead.py [--quick] [--sites 3]

Both sides have the same number of sites on this machine, TLS and node authentication on, the same model (23 MB down and 23 MB up for each
site), the same imports (torch at every site) and the same training: a sleep and a draw of random numbers, timed inside the site. Reply
slots are off. Flower's side sends the model as one array, as pathfed does: Flower moves arrays one by one, and is much slower with a
model's 169 tensors, which is how its own examples send them (`--tensors`). Runs of a few rounds alternate, pathfed, Flower, pathfed,
Flower, ...; all processes of both stay up in between, and those of pathfed that poll often are held still while Flower's rounds run.

A round counts from the server's first act for it to the next state: at Flower in memory, at pathfed checked, averaged, stepped and on disk.
Figure: median overhead of pathfed's rounds over the median of Flower's.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil
from tests.benchmarks._flower_side import FlowerSide, Tls
from tests.benchmarks._harness import Target, arguments, end_on_terminate, finish, interleaved, machine, spread, tell
from tests.benchmarks._pathfed_side import PathfedSide
from tests.benchmarks._round_times import RoundTimes, periods

from pathfed_common.encoder import weights
from pathfed_common.model import initial_state

_TRAIN_S = 0.5
_IDLE_S = 4.0
_TARGETS = {"overhead_ratio": Target("<=", 0.8)}


def main() -> int:
    """Measure and print."""
    given = arguments(
        __doc__,
        ("--sites", {"type": int, "default": 3}),
        ("--blocks", {"type": int, "help": "runs of each side"}),
        ("--rounds", {"type": int, "help": "rounds of a run"}),
        ("--stock-supernode", {"action": "store_true", "help": "run pathfed's sites with Flower's own SuperNode command"}),
        ("--tensors", {"action": "store_true", "help": "let Flower's side send the model as its tensors, not as one array"}),
    )
    end_on_terminate()
    given.blocks = given.blocks or (1 if given.quick else 5)
    given.rounds = given.rounds or (2 if given.quick else 4)
    root = Path(tempfile.mkdtemp(prefix="pathfed-round-overhead-"))
    began = time.monotonic()
    try:
        figures = _measure(root, given)
    except BaseException:
        tell(f"what the processes wrote is left in {root}")
        raise
    shutil.rmtree(root)
    figures["wall_s"] = round(time.monotonic() - began, 1)
    return finish("round_overhead", figures, _TARGETS)


def _measure(root: Path, given: argparse.Namespace) -> dict[str, Any]:
    pathfed = PathfedSide(root / "pathfed", given.sites, given.rounds, _TRAIN_S, given.stock_supernode)
    flower = None
    try:
        pathfed.start()
        state = root / "initial.safetensors"
        state.write_bytes(weights.dump(initial_state(pathfed.plan), {}))
        tls = Tls(ca=pathfed.home.ca_file, certificate=pathfed.home.tls_certificate, key=pathfed.home.tls_key)
        flower = FlowerSide(root / "flower", given.sites, given.rounds, _TRAIN_S, state, tls, flat=not given.tensors)
        flower.start()
        tell("both sides are up")
        idle = {} if given.quick else _idle_cores({"pathfed": pathfed.pids(), "flower": flower.pids()})
        measured = flower.measure

        def alone(block: int) -> list[RoundTimes]:
            with pathfed.paused():
                return measured(block)

        runs = interleaved({"pathfed": pathfed.measure, "flower": alone}, given.blocks, tell)
        facts = {
            "sites": given.sites,
            "stock_supernode": given.stock_supernode,
            "flower_sends": "tensors" if given.tensors else "one array",
            "state_bytes": state.stat().st_size,
            "update_bytes": pathfed.update_bytes(),
            "idle_cores": idle,
            "machine": machine(),
        }
        return _figures(runs) | facts
    finally:
        pathfed.stop()
        if flower is not None:
            flower.stop()


def _figures(runs: dict[str, list[list[RoundTimes]]]) -> dict[str, Any]:
    """Figures over all rounds but the first of each side's life, in which things are imported once and for all: that stands alone."""
    rounds = {side: [one for run in found for one in run][1:] for side, found in runs.items()}
    overhead = {side: [each.overhead_s for each in found] for side, found in rounds.items()}
    period = {side: [one for run in found for one in periods(run)] for side, found in runs.items()}
    figures: dict[str, Any] = {"overhead_ratio": _median_ratio(overhead), "period_ratio": _median_ratio(period)}
    # Pair by pair: what a machine with other work on it shows best, for each pair saw much the same of that work.
    by_run = {side: [[each.overhead_s for each in run] for run in found] for side, found in runs.items()}
    figures["overhead_ratio_by_block"] = [
        _median_ratio({"pathfed": ours, "flower": theirs}) for ours, theirs in zip(by_run["pathfed"], by_run["flower"], strict=True)
    ]
    for side, found in rounds.items():
        figures[side] = {
            "overhead_s": spread(overhead[side]),
            "period_s": spread(period[side]),
            "first_round_overhead_s": round(runs[side][0][0].overhead_s, 3),
            "parts_s": {part: spread([each.parts()[part] for each in found]) for part in found[0].parts()},
            "training_s": spread([each.training_s for each in found]),
            "rounds": len(found),
        }
    return figures


def _median_ratio(values: dict[str, list[float]]) -> float:
    return round(statistics.median(values["pathfed"]) / statistics.median(values["flower"]), 3)


def _idle_cores(owners: dict[str, Any]) -> dict[str, float]:
    """Cores that each side's waiting processes take, while nothing runs: what one side costs the other's rounds."""

    def used(pids: Any) -> float:
        trees = [each for pid in pids for each in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
        return sum(sum(each.cpu_times()[:2]) for each in trees)

    time.sleep(_IDLE_S)  # let what just started finish starting
    before = {side: used(pids) for side, pids in owners.items()}
    time.sleep(_IDLE_S)
    return {side: round((used(pids) - before[side]) / _IDLE_S, 3) for side, pids in owners.items()}


if __name__ == "__main__":
    sys.exit(main())
