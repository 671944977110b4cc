"""The same bytes whatever the order of arrival, the blocks, the threads and the processor; and a full disk leaves none half-written.

Each of the four is shown to be looked at: a fault of its kind is planted, and seen.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pathfed_common import digest
from pathfed_common.encoder import weights
from pathfed_common.encoder.blocks import FileBlocks
from pathfed_common.errors import HostError
from pathfed_common.ids import SiteName
from pathfed_common.plan import AggregationPlan, ServerOptimiserPlan
from pathfed_server.rounds import aggregation, norms
from pathfed_server.rounds.aggregation import aggregate
from pathfed_server.rounds.norms import l2_norm
from pathfed_server.rounds.server_step import SLOTS, step, write_initial_optimiser

ROOT = Path(__file__).parents[3]
RULES = ("mean", "trimmed_mean", "norm_weighted")
NUMBERS = 280_001


def tensors(seed: int) -> dict[str, torch.Tensor]:
    # Numpy's, because the library's own normals depend on the processor's instructions.
    random = np.random.default_rng(seed)
    return {name: torch.from_numpy(random.standard_normal(count, np.float32)) for name, count in (("encoder.w", NUMBERS), ("head.b", 4099))}


def write(folder: Path, name: str, seed: int) -> Path:
    path = folder / name
    path.write_bytes(weights.dump(tensors(seed), {}))
    return path


def updates_in(folder: Path, order: str = "abcde") -> dict[SiteName, Path]:
    return {SiteName(site): write(folder, site, ord(site)) for site in order}


def digest_of(path: Path) -> str:
    return digest.of_bytes(path.read_bytes())


def aggregated(folder: Path, rule: str, *, order: str = "abcde", **more: Any) -> str:
    updates = updates_in(folder, order)
    public = {site: 1.0 + ord(site) % 3 / 7 for site in updates}
    aggregate(AggregationPlan.model_validate({"rule": rule}), updates, public, folder / "mean", **more)
    return digest_of(folder / "mean")


def stepped(folder: Path, name: str) -> list[str]:
    """Digests of the files after two steps."""
    optimiser = ServerOptimiserPlan.model_validate({"name": name, "learning_rate": 0.013, "weight_decay": 0.07, "ema": 0.9})
    write(folder, "state-0", 1)
    write_initial_optimiser(optimiser, folder / "state-0", folder / "slots-0", trained=lambda _: True)
    for index in (1, 2):
        before, after = index - 1, index
        write(folder, "update", 10 + index)
        step(
            optimiser,
            step_index=index,
            state=folder / f"state-{before}",
            mean_update=folder / "update",
            optimiser_state=folder / f"slots-{before}",
            next_state=folder / f"state-{after}",
            next_optimiser_state=folder / f"slots-{after}",
            trained=lambda _: True,
        )
    return [digest_of(folder / "state-2"), digest_of(folder / "slots-2")]


def library_sum(path: Path) -> str:
    """The first planted fault: squares added as the library likes, which depends on threads."""
    return float(FileBlocks(path).read("encoder.w", 0, NUMBERS).double().square().sum()).hex()


def library_normals() -> str:
    """The second: the library's normals, which depend on the processor's instructions."""
    drawn = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    return digest.of_bytes(weights.dump({"x": drawn}, {}))


def figures() -> dict[str, list[str]]:
    """Ours, and the planted ones; for processes of their own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ours = [aggregated(folder, rule) for rule in RULES] + [part for name in SLOTS for part in stepped(folder, name)]
        ours += [l2_norm(FileBlocks(folder / site)).hex() for site in "abcde"]
        return {"ours": ours, "threads": [library_sum(folder / site) for site in "abcde"], "instructions": [library_normals()]}


def test_neither_threads_nor_the_processors_instructions_change_a_bit() -> None:
    """Two threads without vector instructions, and one thread with the best there are."""
    program = "import json; from tests.server.rounds.test_bits import figures; print(json.dumps(figures()))"
    running = []
    for threads, chosen in ((2, {"ATEN_CPU_CAPABILITY": "default"}), (1, {})):
        environment = {**os.environ, **chosen, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        running.append(subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    first, second = (json.loads(process.communicate()[0]) for process in running)
    assert first["ours"] == second["ours"]
    assert first["threads"] != second["threads"]
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT" or first["instructions"] != second["instructions"]


def _orders_differ(folder: Path) -> bool:
    return len({aggregated(folder, "mean", order=order) for order in ("abcde", "edcba", "cabed")}) > 1


def test_order_of_arrival_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _orders_differ(tmp_path)
    monkeypatch.setattr(aggregation, "sorted", _arrival_order, raising=False)
    assert _orders_differ(tmp_path)


def _arrival_order(sites: Any) -> Any:
    # The check that weights and updates are of the same sites compares two mappings, which arrive in one order here.
    return list(sites)


def _blocks_differ(folder: Path, planted: Callable[[torch.Tensor], list[float]] | None = None) -> bool:
    held = FileBlocks(write(folder, "update", 3))
    with pytest.MonkeyPatch.context() as patch:
        if planted is not None:
            patch.setattr(norms, "_squares", planted)
        return len({l2_norm(held, block=block * 4096).hex() for block in (1, 3, 16, 64)}) > 1


def test_size_of_blocks_is_looked_at(tmp_path: Path) -> None:
    assert not _blocks_differ(tmp_path)
    assert _blocks_differ(tmp_path, lambda values: [float(values.square().sum())])


@pytest.mark.parametrize("rule", RULES)
def test_a_full_disk_leaves_no_aggregate(rule: str, tmp_path: Path, small_disk: Path) -> None:
    public = dict.fromkeys(updates_in(tmp_path), 1.0)
    with pytest.raises(HostError, match="PF901"):
        aggregate(AggregationPlan.model_validate({"rule": rule}), updates_in(tmp_path), public, small_disk / "mean")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("full", ["slots", "state"])
def test_a_full_disk_leaves_neither_slots_nor_state_half_written(full: str, tmp_path: Path, small_disk: Path) -> None:
    """The files before stay as they were, so that the step is simply made again."""
    optimiser = ServerOptimiserPlan(name="sgd", ema=0.9)
    write(tmp_path, "state", 1)
    write_initial_optimiser(optimiser, tmp_path / "state", tmp_path / "slots", trained=lambda _: True)
    before = [digest_of(tmp_path / name) for name in ("state", "slots")]
    places = {name: (small_disk if name == full else tmp_path) / f"next-{name}" for name in ("slots", "state")}

    def again(places: dict[str, Path]) -> None:
        step(
            optimiser,
            step_index=1,
            state=tmp_path / "state",
            mean_update=write(tmp_path, "update", 2),
            optimiser_state=tmp_path / "slots",
            next_state=places["state"],
            next_optimiser_state=places["slots"],
            trained=lambda _: True,
        )

    with pytest.raises(HostError, match="PF901"):
        again(places)
    assert list(small_disk.iterdir()) == []
    assert not places["state"].exists()
    assert [digest_of(tmp_path / name) for name in ("state", "slots")] == before
    again({name: tmp_path / f"next-{name}" for name in ("slots", "state")})


def test_a_full_disk_leaves_no_first_slots(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(HostError, match="PF901"):
        write_initial_optimiser(ServerOptimiserPlan(ema=0.9), write(tmp_path, "state", 1), small_disk / "slots", trained=lambda _: True)
    assert list(small_disk.iterdir()) == []
