"""Scanning a folder of many small slides: slides a minute, memory, and what a kill -9 in the middle costs.

    .venv/bin/python tests/benchmarks/scan.py [--quick] [--workers N]

Paints a few slides and makes 2,000 of them, each with content of its own; 5% are damaged in five ways. Then:

- scans them with `pathfed-site scan`'s parts in a process of its own, and measures time and memory of the scan and its readers;
- scans them again into another database, kills that scan with -9 half-way, resumes it, and counts the slides that were read twice;
- scans once more with nothing to do.

Both databases must end with the same cohort. `--quick` has 200 slides: its repeated work is a larger share, for what is in flight at the
kill does not shrink with the folder.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import psutil
from tests.benchmarks._harness import Target, arguments, end_on_terminate, finish, machine, tell

from pathfed_client.io.scan import scan
from pathfed_client.io.scan_workers import ProcessExecutor, usable_cpus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.slides.tiling import scan_key
from pathfed_common.plan import CohortPlan
from pathfed_common.synthetic import draw_anatomy, draw_stain, paint
from pathfed_local.generator import slide_bytes

_SLIDES, _QUICK_SLIDES = 2000, 200
_BODIES = 8
_SIDE_PX = 1024
_DAMAGED_EVERY = 20
_PLAN = CohortPlan(tile_px=224)
_KEY = bytes(range(32))
_POLL_S = 0.05
_TARGETS = {
    "repeated_share": Target("<", 0.02),
    "same_cohort": Target(">=", 1),
    "right_verdicts": Target(">=", 1),
    "index_bytes_per_tile": Target("<=", 8.0),
}


def main() -> int:
    """Measure and print; or, as a child, scan."""
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        return _child(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    given = arguments(__doc__, ("--workers", {"type": int, "default": usable_cpus(), "help": "reading processes"}))
    end_on_terminate()
    count = _QUICK_SLIDES if given.quick else _SLIDES
    root = Path(tempfile.mkdtemp(prefix="pathfed-scan-"))
    try:
        before = machine()
        damaged = _write(root, count)
        tell(f"{count} slides written, {damaged} of them damaged")
        figures = _measure(root, count, given.workers)
    finally:
        shutil.rmtree(root)
    figures = {"slides": count, "damaged": damaged, "workers": given.workers, **figures}
    figures["right_verdicts"] = int(figures["usable"] == count - damaged)
    if given.quick:
        figures["quick"] = True
    # With fewer slides the slides in flight weigh more: the smoke run is held to the full run's number of them.
    targets = {**_TARGETS, "repeated_share": Target("<", 0.02 * _SLIDES / count)}
    return finish("scan", {**figures, "machine_before": before}, targets)


def _measure(root: Path, count: int, workers: int) -> dict[str, Any]:
    whole = _run(root, "whole.db", workers)
    tell(f"whole scan: {whole['seconds']:.1f} s")
    killed = _run(root, "killed.db", workers, kill_at=count // 2)
    rest = _run(root, "killed.db", workers)
    again = _run(root, "killed.db", workers)
    with SiteStore(root / "whole.db") as one, SiteStore(root / "killed.db") as other:
        same = one.cohort(scan_key(_PLAN)).digest == other.cohort(scan_key(_PLAN)).digest
        index = sum(record.tiles.size for record in one.slides(scan_key(_PLAN)).values() if record.tiles is not None)
    # Read by the killed scan, by its own count, and by the one that took it up.
    repeated = killed["begun"] + rest["read"] - count
    return {
        "slides_per_minute": round(60 * count / whole["seconds"]),
        "slides_per_minute_and_worker": round(60 * count / whole["seconds"] / workers),
        "memory_peak_mb": whole["memory_peak_mb"],
        "scan_memory_peak_mb": whole["scan_memory_peak_mb"],
        "usable": whole["usable"],
        "tiles": whole["tiles"],
        "database_bytes_per_tile": round((root / "whole.db").stat().st_size / whole["tiles"], 2),
        "index_bytes_per_tile": round(index / whole["tiles"], 2),
        "killed_after": killed["kept"],
        "repeated_slides": repeated,
        "repeated_share": round(repeated / count, 4),
        "same_cohort": int(same),
        "nothing_to_do_s": round(again["seconds"], 2),
    }


def _run(root: Path, database: str, workers: int, kill_at: int = 0) -> dict[str, Any]:
    """Scan in a process of its own; its figures, and its memory with and without its readers."""
    began = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(root), database, str(workers), str(kill_at)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        memory, own = _watched(process)
        assert process.stdout is not None
        said = process.stdout.read().splitlines()
    seconds = time.monotonic() - began
    if process.returncode not in (0, -signal.SIGKILL) or (process.returncode == 0) == bool(kill_at):
        raise RuntimeError(f"the scan ended with status {process.returncode}")
    figures: dict[str, Any] = json.loads(said[-1])
    return {**figures, "seconds": seconds, "memory_peak_mb": memory, "scan_memory_peak_mb": own}


def _watched(process: "subprocess.Popen[str]") -> tuple[int, int]:
    """Peak memory until a process ends, MB: with its children, and its own. Shared pages count once a process: upper bounds."""
    together = own = 0
    scan_process = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [scan_process, *scan_process.children(recursive=True)]
            sizes = [one.memory_info().rss for one in family]
        except psutil.NoSuchProcess:
            continue
        together, own = max(together, sum(sizes)), max(own, sizes[0])
        time.sleep(_POLL_S)
    return round(together / 1e6), round(own / 1e6)


class _Counting(ProcessExecutor):
    """Counts the slides whose reading has begun."""

    begun = 0

    def submit(self, task: Any, /) -> None:
        self.begun += 1
        super().submit(task)


def _child(root: Path, database: str, workers: int, kill_at: int) -> int:
    executor = _Counting(workers)
    with SiteStore(root / database) as store, executor:

        def progress(done: int, total: int) -> None:
            if done == kill_at:
                print(json.dumps({"begun": executor.begun, "kept": done}), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

        report = scan(store, root / "slides", root / "patients.csv", _PLAN, _KEY, progress, executor=executor)
    usable = sum(1 for slide in report.slides if slide.reason is None)
    print(json.dumps({"read": report.slides_read, "usable": usable, "tiles": report.tiles}))
    return 0


def _write(root: Path, count: int) -> int:
    """Write the slides and their list; how many are damaged."""
    (root / "slides").mkdir()
    bodies = list(_bodies())
    rows, damaged = ["slide,patient"], 0
    for number in range(count):
        # Bytes behind the last level change the content, and nothing that is seen.
        data = bodies[number % _BODIES] + f"slide {number}".encode()
        if number % _DAMAGED_EVERY == 0:
            data = _damage(data, damaged)
            damaged += 1
        folder = root / "slides" / f"{number // 100:03d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:06d}.tif").write_bytes(data)
        rows.append(f"{number:06d}.tif,MRN{number // 2:06d}")
    (root / "patients.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return damaged


def _bodies() -> Iterator[bytes]:
    for number in range(_BODIES):
        random = np.random.default_rng(number)
        yield slide_bytes(paint(_SIDE_PX, _SIDE_PX, random, draw_stain(random, 0), draw_anatomy(random), glass=False))


def _damage(data: bytes, number: int) -> bytes:
    """A slide that is empty, cut off, no TIFF, full of noise, or without a resolution that can be believed."""
    kind = number % 5
    if kind == 0:
        return b""
    if kind == 1:
        return data[: len(data) // 3]
    noise = np.random.default_rng(number).bytes(len(data))
    if kind == 2:
        return noise
    if kind == 3:
        return data[:16] + noise[16:]
    pixels = np.random.default_rng(number).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    return slide_bytes(pixels, mpp=28.97)


if __name__ == "__main__":
    sys.exit(main())
