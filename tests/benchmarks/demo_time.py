"""Wall time of the demo's phases, and the memory its processes take.

    .venv/bin/python tests/benchmarks/demo_time.py [--quick]

Runs `pathfed demo` as a person would, in a folder that is removed afterwards. The full run has every default: three hospitals painted on
the spot, five rounds, reply slots. `--quick` has two small hospitals, one round and no slots: it shows that the demo runs.
The demo measures itself (`demo.json`); the time around it, with start and shutdown, is taken here.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks._harness import Target, arguments, end_on_terminate, finish, machine, tell

from pathfed_local.consortium import program
from pathfed_local.generator import generate_hospitals

_TARGETS = {
    "total_s": Target("<=", 240.0),
    "site_memory_peak_mb": Target("<", 2000.0),
    "server_memory_peak_mb": Target("<", 1500.0),
}
_QUICK = ("--rounds", "1", "--sites", "2", "--no-reply-slots")
_QUICK_PATIENTS = 8


def main() -> int:
    """Measure and print."""
    given = arguments(__doc__, ("--slides", {"help": "folder of hospitals, as `pathfed demo --slides` takes it; painted if not given"}))
    end_on_terminate()
    root = Path(tempfile.mkdtemp(prefix="pathfed-demo-time-"))
    out, log = root / "demo", root / "output.txt"
    if given.quick and given.slides is None:
        generate_hospitals(root / "data", hospitals=2, patients=_QUICK_PATIENTS, slides_per_patient=1, side_px=(512, 768))
        given.slides = str(root / "data")
    options = [*(_QUICK if given.quick else ()), *(["--slides", given.slides] if given.slides else ())]
    before = machine()
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen([str(program("pathfed")), "demo", "--out", str(out), *options], stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait()
        finally:
            if process.poll() is None:  # we are being ended: so is the demo, which ends its own processes
                process.terminate()
                process.wait()
    total = time.monotonic() - began
    if status != 0:
        tell(log.read_text(errors="replace")[-4000:])
        tell(f"the demo ended with status {status}; what it left is in {root}")
        return 2
    figures = _figures(total, json.loads((out / "demo.json").read_text(encoding="utf-8")))
    shutil.rmtree(root)
    return finish("demo_time", {**figures, "quick": given.quick, "machine_before": before}, _TARGETS)


def _figures(total_s: float, told: dict[str, Any]) -> dict[str, Any]:
    """Seconds by phase; the largest site's memory and the server's. Resident memory counts shared pages once a process: upper bounds."""
    memory = {owner: round(float(peak)) for owner, peak in told["memory_peak_mb"].items()}
    phases = {name: round(float(seconds), 1) for name, seconds in told["phases_s"].items()}
    return {
        "total_s": round(total_s, 1),
        "phases_s": phases,
        "other_s": round(total_s - sum(phases.values()), 1),
        "site_memory_peak_mb": max(peak for owner, peak in memory.items() if owner != "server"),
        "server_memory_peak_mb": memory["server"],
        "memory_peak_mb": memory,
    }


if __name__ == "__main__":
    sys.exit(main())
