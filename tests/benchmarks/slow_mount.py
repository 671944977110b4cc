"""What a local cache of native tiles would gain on a slow mount, at most; and what more reading processes gain.

    .venv/bin/python tests/benchmarks/slow_mount.py [--quick]

Three questions, for docs/decisions:

- draws: of the tiles a run reads, which share was read before in that run? No cache can have more hits. Patients are drawn at the
  public rate, k tiles of each, uniformly, as a round does.
- waiting: tiles read from a simulated mount (10 ms a round trip, 100 MB/s, whole pages, a page cache that holds a quarter of the slides),
  without and with the best cache there could be: unlimited, free, of all that was ever read. Waiting is added up, not waited for, so the
  load of the machine does not count.
- workers: tiles a second from the same mount, waited for in earnest, with more reading processes.
"""

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import _slides
from tests.benchmarks._harness import Target, arguments, finish, machine, tell
from tests.benchmarks._slow_mount import LATENCY, PAGE, SlowMount

from pathfed_client.io import tile_workers
from pathfed_client.io.doctor.looking import measure_speed
from pathfed_client.io.doctor.slides import LookTask, look_at
from pathfed_client.io.slide_listing import list_slides
from pathfed_client.io.tile_reader import SlideSource, TileReader
from pathfed_common.plan import CohortPlan

_ROOT = Path(__file__).parents[2]
_PLAN = CohortPlan(tissue_share=0.0)
_LATENCY_S, _BYTES_PER_S = 0.010, 1e8
_SIDE = 5120
_PER_SLIDE = (_SIDE // 256) ** 2
#: Patients, tiles a patient, expected patients a step, tiles drawn of each, steps of the run.
_RUNS = {
    "small site, short run": (200, 5_000, 64, 4, 100),
    "middle site, long run": (1_000, 20_000, 256, 16, 200),
    "large site, long run": (10_000, 10_000, 512, 16, 500),
    "few tiles, very long run": (200, 2_000, 64, 16, 1_000),
}
_TARGETS = {"gain_at_2_percent_drawn": Target("<=", 1.1)}


def main() -> int:
    """Measure and print."""
    given = arguments(__doc__)
    before = machine()
    figures: dict[str, Any] = {"read_before_share": {name: _read_before(*run) for name, run in _RUNS.items()}}
    with tempfile.TemporaryDirectory(prefix="pathfed-slow-mount-") as folder:
        root = Path(folder)
        _build(root, 6 if given.quick else 32)
        figures["tiles_per_s_by_workers"] = _by_workers(root, 1.0 if given.quick else 5.0)
        figures |= _waiting(root, [0.02] if given.quick else [0.02, 0.25, 1.0])
    return finish("slow_mount", {**figures, "quick": given.quick, "machine_before": before}, _TARGETS)


def _read_before(patients: int, tiles: int, expected: int, drawn: int, steps: int) -> float:
    """Share of the tiles a run reads that it had read before."""
    generator = np.random.default_rng(0)
    seen = np.zeros(patients * tiles, bool)
    read = again = 0
    for _ in range(steps):
        chosen = np.flatnonzero(generator.random(patients) < expected / patients)
        at = np.unique(chosen[:, None] * tiles + generator.integers(0, tiles, (len(chosen), drawn)))
        again += int(seen[at].sum())
        read += at.size
        seen[at] = True
    return round(again / read, 4)


def _build(root: Path, slides: int) -> None:
    tell(f"building {slides} slides of {_SIDE} x {_SIDE} px")
    tiles = _slides.ycbcr_tiles()
    for number in range(slides):
        turned = tiles[number % len(tiles) :] + tiles[: number % len(tiles)]
        _slides.write_slide(root / f"{number:02d}.tif", turned, side=_SIDE, tile_px=256, photometric="ycbcr")


def _by_workers(root: Path, seconds: float) -> dict[str, float]:
    """With real waiting, in processes whose reads are slow."""
    looks = [look_at(LookTask(slide, _PLAN, number)) for number, slide in enumerate(list_slides(root).slides)]
    os.environ |= {LATENCY: str(_LATENCY_S), "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    vars(tile_workers)["_MODULE"] = "tests.benchmarks._slow_mount"
    found = {}
    for workers in (1, 2, 4, 8):
        seen = measure_speed(root, looks, tile_px=_PLAN.tile_px, tiles_per_slide=4, workers=workers, seconds=seconds)
        assert seen is not None
        found[str(workers)] = round(seen.rate, 1)
        tell(f"{workers} workers: {seen.rate:.1f} tiles a second")
    return found


def _waiting(root: Path, shares: list[float]) -> dict[str, Any]:
    sources = list(_sources(root))
    bytes_all = sum(path.stat().st_size for path in root.iterdir())
    quarter = bytes_all // PAGE // 4
    mount = SlowMount(latency_s=_LATENCY_S, bytes_per_s=_BYTES_PER_S, cache_pages=quarter, wait=lambda seconds: None)
    figures: dict[str, Any] = {}
    for share in shares:
        waited = {}
        for side in (False, True):
            mount.forget(remembers=side, cache_pages=quarter)
            tiles, cpu = _read_run(root, sources, round(share * len(sources) * _PER_SLIDE))
            waited[side] = 1e3 * mount.waited / tiles
            if not side:
                figures[f"trips_a_tile_at_{share:.0%}"] = round(mount.trips / tiles, 2)
                figures[f"opens_a_tile_at_{share:.0%}"] = round(mount.opens / tiles, 3)
                figures[f"cpu_ms_a_tile_at_{share:.0%}"] = round(1e3 * cpu / tiles, 2)
        figures[f"waited_ms_a_tile_at_{share:.0%}"] = {"page cache": round(waited[False], 2), "best cache as well": round(waited[True], 2)}
        figures[f"gain_at_{share:.0%}_drawn".replace("%", "_percent")] = round(waited[False] / waited[True], 3)
        tell(f"{share:.0%} of the tiles drawn: {waited[False]:.2f} ms a tile, with the best cache {waited[True]:.2f} ms")
    return figures


def _sources(root: Path) -> Iterator[SlideSource]:
    """Slides as scanned, without reading their pixels."""
    for slide in list_slides(root).slides:
        look = look_at(LookTask(slide, _PLAN, 0))
        assert look.source is not None
        yield look.source


def _read_run(root: Path, sources: list[SlideSource], count: int) -> tuple[int, float]:
    """Steps of a run: a quarter of the slides a step, four tiles of each. Tiles read, and CPU seconds."""
    generator = random.Random(0)
    read, began = 0, time.process_time()
    with TileReader(root, open_slides=16) as reader:
        while read < count:
            for source in generator.sample(sources, max(1, len(sources) // 4)):
                for _ in range(4):
                    column, row = generator.randrange(source.grid.columns), generator.randrange(source.grid.rows)
                    reader.read(source, *source.grid.place(column, row, generator.random(), generator.random()))
                    read += 1
    return read, time.process_time() - began


if __name__ == "__main__":
    sys.exit(main())
