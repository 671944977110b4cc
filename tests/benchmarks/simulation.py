"""What a server does with many sites: rounds a minute, its memory, and its time for each site, as virtual sites become more.

    .venv/bin/python tests/benchmarks/simulation.py [--quick] [--most N]

Runs `pathfed simulate` (the real round loop, admission, aggregation and record; virtual sites on Flower's simulation engine) with 10, 50
and 200 sites one after the other, in folders that are removed afterwards. `--quick`: 4 and 8 sites, one round. Wants the extra
`simulation`. Aimed at: memory that does not grow with the sites.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks._harness import Target, arguments, end_on_terminate, finish, tell

from pathfed_local.consortium import program

SITES, QUICK = (10, 50, 200), (4, 8)
ROUNDS = 3
_FIGURES = (
    "round_s",
    "rounds_per_minute",
    "admission_ms_per_site",
    "aggregation_ms_per_site",
    "server_ms_per_site",
    "step_s",
    "server_mb_at_start",
    "server_mb_at_peak",
    "sites_mb_at_peak",
)


def simulate(root: Path, sites: int, rounds: int) -> dict[str, Any]:
    """One simulation's figures."""
    command = [str(program("pathfed")), "simulate", "--sites", str(sites), "--rounds", str(rounds), "--out", str(root), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            out, told = running.communicate()
        finally:
            running.terminate()  # we are being ended: so is the simulation, which ends its own processes
    if running.returncode != 0:
        raise SystemExit(f"the simulation ended with status {running.returncode}: {out[-500:]} {told[-500:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def main() -> int:
    """Measure and print."""
    given = arguments(__doc__, ("--most", {"type": int, "default": max(SITES), "help": "sites at most"}))
    end_on_terminate()
    chosen = QUICK if given.quick else [sites for sites in SITES if sites <= given.most]
    figures: dict[str, Any] = {}
    for sites in chosen:
        root = Path(tempfile.mkdtemp(prefix="pathfed-simulation-"))
        try:
            found = simulate(root / "out", sites, 1 if given.quick else ROUNDS)
        finally:
            shutil.rmtree(root)
        tell(f"{sites} sites: {found['rounds_per_minute']} rounds a minute, {found['server_ms_per_site']} ms of the server for each site")
        figures |= {f"{sites}_sites_{name}": found[name] for name in _FIGURES}
        figures["update_mb"] = found["update_mb"]
    least, most = chosen[0], chosen[-1]
    figures["memory_ratio"] = round(figures[f"{most}_sites_server_mb_at_peak"] / figures[f"{least}_sites_server_mb_at_peak"], 3)
    return finish("simulation", figures, {} if given.quick else {"memory_ratio": Target("<=", 1.2)})


if __name__ == "__main__":
    sys.exit(main())
