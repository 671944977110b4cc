"""From slides to training-ready tensors: the whole stream beside a plain OpenSlide and torch DataLoader pipeline.

    .venv/bin/python tests/benchmarks/tile_stream.py [--quick]

Both sides give normalised float32 tensors of 224 x 224 px, cut at random places and flipped at random, from the same slides built of real
tiles (256-px YCbCr 4:2:0), patient by patient. Ours is what a round uses: index, stream, workers, augmentation. The peer is what many
projects write: a Dataset whose `__getitem__` opens slides once, reads a region through OpenSlide and applies the same augmentation. CPU
time is that of this process and its children. Peak memory is given for a few and for many slides.
"""

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import _slides
from tests.benchmarks._harness import Target, arguments, finish, interleaved, machine, tell

from pathfed_client.cohort.cohort import Cohort
from pathfed_client.cohort.sampling import draw_tiles
from pathfed_client.io.scan import scan
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.tile_stream import TileStream
from pathfed_client.io.tile_workers import TileWorkers
from pathfed_client.slides.tiling import scan_key
from pathfed_client.training.augmentation import NO_AUGMENTATION, Augmentation, training_tensors
from pathfed_common.encoder.spec import PIXEL_MEAN, PIXEL_STD
from pathfed_common.plan import CohortPlan
from pathfed_common.privacy.randomness import KeyedRandom

_PLAN = CohortPlan(tissue_share=0.1)
_TILES_PER_PATIENT = 16
#: Where the peer's grid begins, level-0 pixels: at its tissue's bounding box, as in common pipelines, so anywhere within native tiles.
_GRID_START = (100, 37)
_TARGETS = {
    "per_cpu_s_to_peer_one_worker": Target(">=", 4.0),
    "per_cpu_s_to_peer_two_workers": Target(">=", 4.0),
    "memory_many_to_few_slides": Target("<=", 1.1),
}


def main() -> int:
    """Measure and print."""
    given = arguments(__doc__, ("--memory-of", {"help": "a folder to stream once, for its peak memory alone"}))
    if given.memory_of:
        return _stream_once(Path(given.memory_of))
    torch.set_num_threads(1)
    before = machine()
    with tempfile.TemporaryDirectory(prefix="pathfed-tile-stream-") as folder:
        few, many = Path(folder) / "few", Path(folder) / "many"
        _build(few, slides=8, side=10_240)
        _build(many, slides=24 if given.quick else 80, side=10_240)
        figures = _compared(few, blocks=2 if given.quick else 7, patients=4 if given.quick else 16)
        figures |= _augmentation_costs()
        peaks = {path.name: _peak_memory(path) for path in (few, many)}
    figures["memory_many_to_few_slides"] = round(peaks["many"] / peaks["few"], 3)
    figures["memory_mb"] = {name: round(peak) for name, peak in peaks.items()}
    return finish("tile_stream", {**figures, "quick": given.quick, "machine_before": before}, _TARGETS)


def _build(root: Path, *, slides: int, side: int) -> None:
    """A scanned site: every slide is a patient. Slides are copies of a few bodies with another end each."""
    tell(f"building and scanning {slides} slides of {side} x {side} px")
    (root / "slides").mkdir(parents=True)
    tiles = _slides.ycbcr_tiles()
    bodies = min(slides, 4)
    for number in range(slides):
        path = root / "slides" / f"{number}.tif"
        if number < bodies:
            _slides.write_slide(path, tiles[number:] + tiles[:number], side=side, tile_px=256, photometric="ycbcr")
        else:
            shutil.copyfile(root / "slides" / f"{number % bodies}.tif", path)
        with path.open("ab") as file:
            file.write(f"slide {number}".encode())  # equal content of different patients is refused
    (root / "patients.csv").write_text("slide,patient\n" + "".join(f"{n}.tif,P{n}\n" for n in range(slides)))
    with SiteStore(root / "site.db") as store:
        scan(store, root / "slides", root / "patients.csv", _PLAN, bytes(32))


@contextmanager
def _cpu_and_wall() -> Iterator[Callable[[], tuple[float, float]]]:
    """CPU seconds of this process and its living children, and wall seconds, since the beginning."""

    def cpu() -> float:
        times = [psutil.Process().cpu_times()]
        times += [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        reaped = psutil.Process().cpu_times()
        return sum(time.user + time.system for time in times) + reaped.children_user + reaped.children_system

    began = cpu(), time.monotonic()
    yield lambda: (cpu() - began[0], time.monotonic() - began[1])


def _compared(root: Path, *, blocks: int, patients: int) -> dict[str, Any]:
    sides: dict[str, Callable[[int], Sequence[dict[str, float]]]] = {}
    with SiteStore(root / "site.db") as store:
        cohort = store.cohort(scan_key(_PLAN))
        for workers in (1, 2):
            sides[f"ours_{workers}"] = partial(_ours, root, store, cohort, workers, patients)
            sides[f"peer_{workers}"] = partial(_peer, root, workers, patients * _TILES_PER_PATIENT)
        found = interleaved(sides, blocks, tell)

    def median(side: str, figure: str) -> float:
        return statistics.median(one[figure] for block in found[side] for one in block)

    figures: dict[str, Any] = {
        f"tiles_{figure}_{side}": round(median(side, figure), 1) for side in sides for figure in ("per_cpu_s", "per_s")
    }
    for workers, word in ((1, "one_worker"), (2, "two_workers")):
        for figure in ("per_cpu_s", "per_s"):
            ratio = median(f"ours_{workers}", figure) / median(f"peer_{workers}", figure)
            figures[f"{figure}_to_peer_{word}"] = round(ratio, 2)
    return figures


def _ours(root: Path, store: SiteStore, cohort: Cohort, workers: int, patients: int, block: int) -> list[dict[str, float]]:
    """Tiles a second as a round takes them, after a first patient that starts the processes."""
    with TileWorkers(root / "slides", _PLAN.tile_px, workers) as pool, TileStream(store, root / "slides", _PLAN, workers=pool) as stream:
        chosen = [cohort.patients[(block + number) % len(cohort.patients)] for number in range(patients)]
        random = KeyedRandom(bytes(32), {"block": block})
        draws = [draw_tiles(patient, _TILES_PER_PATIENT, random.child("tiles", n)) for n, patient in enumerate(chosen)]
        for refs in draws[: 2 * workers]:
            stream.read(refs)
        with _cpu_and_wall() as taken:
            stream.expect(draws)
            count = 0
            for number, refs in enumerate(draws):
                tiles = training_tensors(stream.read(refs), Augmentation(), random.child("augmentation", number))
                count += len(tiles)
            cpu, wall = taken()
    return [{"per_cpu_s": count / cpu, "per_s": count / wall}]


class _PlainTiles(Dataset[Tensor]):
    """The peer: a region through OpenSlide, made a tensor, cut and flipped."""

    def __init__(self, slides: Sequence[Path], count: int, seed: int) -> None:
        self._slides = slides
        self._count = count
        self._seed = seed
        self._open: dict[Path, openslide.OpenSlide] = {}
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        random = np.random.default_rng([self._seed, index])
        path = self._slides[index // _TILES_PER_PATIENT % len(self._slides)]
        slide = self._open.setdefault(path, openslide.OpenSlide(path)) if path not in self._open else self._open[path]
        width, height = slide.dimensions
        x, y = (offset + random.integers(0, side // 256 - 1) * 256 for offset, side in zip(_GRID_START, (width, height), strict=True))
        dx, dy = random.integers(0, 33, 2)
        picture = slide.read_region((int(x + dx), int(y + dy)), 0, (224, 224)).convert("RGB")
        tile = (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255) - self._mean) / self._std
        if random.random() < 0.5:
            tile = tile.flip(2)
        if random.random() < 0.5:
            tile = tile.flip(1)
        return torch.rot90(tile, int(random.integers(0, 4)), (1, 2)).contiguous()


def _peer(root: Path, workers: int, tiles: int, block: int) -> list[dict[str, float]]:
    slides = sorted((root / "slides").iterdir())
    first = 2 * workers * _TILES_PER_PATIENT
    data = _PlainTiles(slides, first + tiles, block)
    loader = DataLoader(data, batch_size=_TILES_PER_PATIENT, num_workers=workers, prefetch_factor=2)
    batches = iter(loader)
    for _ in range(2 * workers):
        next(batches)
    with _cpu_and_wall() as taken:
        count = sum(len(batch) for batch in batches)
        cpu, wall = taken()
    return [{"per_cpu_s": count / cpu, "per_s": count / wall}]


def _augmentation_costs() -> dict[str, Any]:
    """Microseconds of CPU a tile that each augmentation adds to normalising."""
    tiles = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), np.uint8)
    kinds = {
        "none": NO_AUGMENTATION,
        "flips": Augmentation(flips=True, quarter_turns=False),
        "quarter_turns": Augmentation(flips=False, quarter_turns=True),
        "hed_jitter": Augmentation(flips=False, quarter_turns=False, hed_jitter=0.05),
    }

    def cost(augmentation: Augmentation, block: int) -> list[float]:
        began = time.process_time()
        training_tensors(tiles, augmentation, KeyedRandom(bytes(32), {"block": block}))
        return [(time.process_time() - began) / len(tiles) * 1e6]

    found = interleaved({name: partial(cost, kind) for name, kind in kinds.items()}, 15, lambda text: None)
    medians = {name: statistics.median(value for block in blocks for value in block) for name, blocks in found.items()}
    return {
        "normalise_us": round(medians["none"]),
        "added_us": {name: round(value - medians["none"]) for name, value in medians.items() if name != "none"},
    }


def _peak_memory(root: Path) -> float:
    """Peak resident memory, MB, of a process that streams a tile of every slide of a folder, without workers."""
    done = subprocess.run([sys.executable, __file__, "--memory-of", str(root)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _stream_once(root: Path) -> int:
    with SiteStore(root / "site.db") as store, TileStream(store, root / "slides", _PLAN) as stream:
        cohort = store.cohort(scan_key(_PLAN))
        for _ in range(3):
            for number, patient in enumerate(cohort.patients):
                stream.read(draw_tiles(patient, 4, KeyedRandom(bytes(32), {"patient": number})))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return 0


if __name__ == "__main__":
    sys.exit(main())
