"""One side of `aggregation_memory.py`, in a process of its own: prints seconds, bytes of updates and peak memory as JSON.

The peak is what the resident size grows to, above the interpreter with all modules imported.

    rounds <rule> <sites>   our server: aggregate the update files, then step; each site's file is one of at most eight
    flower <sites>          Flower's FedAvg: the replies as messages in memory, as its strategy holds them, aggregated by its own code
    copy <sites>            as many bytes copied once in memory, by numpy
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from pathfed_common.encoder import weights
from pathfed_common.ids import SiteName
from pathfed_common.plan import AggregationPlan, ServerOptimiserPlan
from pathfed_server.rounds.aggregation import aggregate
from pathfed_server.rounds.server_step import step, write_initial_optimiser

#: Files of updates that differ; with more sites than these, several read the same.
FILES = 8


def rounds(folder: Path, rule: str, sites: int) -> dict[str, float]:
    """Our server's part of a round, from update files to the next state."""
    optimiser = ServerOptimiserPlan(name="nesterov")
    updates = {SiteName(f"site-{index:03d}"): folder / f"update-{index % FILES}" for index in range(sites)}
    write_initial_optimiser(optimiser, folder / "state", folder / "slots", trained=lambda _: True)
    began = time.perf_counter()
    aggregate(AggregationPlan.model_validate({"rule": rule}), updates, dict.fromkeys(updates, 1.0), folder / "mean")
    aggregated = time.perf_counter()
    step(
        optimiser,
        step_index=1,
        state=folder / "state",
        mean_update=folder / "mean",
        optimiser_state=folder / "slots",
        next_state=folder / "next-state",
        next_optimiser_state=folder / "next-slots",
        trained=lambda _: True,
    )
    return {"aggregate_s": aggregated - began, "step_s": time.perf_counter() - aggregated}


def flower(folder: Path, sites: int) -> dict[str, float]:
    """Flower's aggregation of replies that have arrived; reading and unpacking them is not timed."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # a message wants to know whose it is
    replies = []
    for index in range(sites):
        read = weights.reader(folder / f"update-{index % FILES}")
        arrays = ArrayRecord({name: Array(read(name).numpy()) for name in weights.header(folder / "update-0")})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1.0})})
        replies.append(Message(content, dst_node_id=1, message_type="train"))
    began = time.perf_counter()
    found, _ = FedAvg(weighted_by_key="num-examples").aggregate_train(1, replies)
    if found is None or len(found) != len(weights.header(folder / "update-0")):
        raise RuntimeError("Flower aggregated nothing")
    return {"aggregate_s": time.perf_counter() - began}


def copy(folder: Path, sites: int) -> dict[str, float]:
    """As many bytes as the updates have, copied in memory; the pages were touched before."""
    size = (folder / "update-0").stat().st_size
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    began = time.perf_counter()
    for _ in range(sites):
        np.copyto(target, source)
    return {"aggregate_s": time.perf_counter() - began}


def resident_mb(field: str) -> float:
    """A size from the kernel's account of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1000


def main() -> None:
    """Measure the side that the arguments name."""
    folder, side, *rest = Path(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    if side == "flower":
        import flwr.serverapp.strategy  # noqa: F401  # the interpreter's part
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    sites = int(rest[-1])
    sides: dict[str, Any] = {"rounds": lambda: rounds(folder, rest[0], sites), "flower": lambda: flower(folder, sites)}
    found = sides.get(side, lambda: copy(folder, sites))()
    total = sites * (folder / "update-0").stat().st_size
    print(json.dumps({**found, "bytes": total, "peak_mb": resident_mb("VmHWM") - before}), flush=True)


if __name__ == "__main__":
    main()
