"""MB/s of base states down and updates up, and peak memory of each process: pathfed's bulk plane, a plain TLS socket, Flower's own path.

Each end is a process of its own, over TLS on loopback. pathfed: the control plane's process with its database, and a site's process that
fetches or delivers as a round does (mutual TLS, authorisation at every call, egress record, shards verified and flushed, whole base state
verified). Plain socket: Python's ssl, messages of 1 MiB, and at the receiver the same hashing, writing and flushing; it authorises, resumes
and writes down nothing. Flower: SuperLink, SuperNode, ClientApp and FedAvg as they ship, one array; what a round of 1 MB takes is taken
off, for it waits in polls. The sides alternate.

MB are 10^6 bytes. `--relay` adds the way through a site's relay, which all of a site's traffic takes. Flower's path is measured at the
smaller size alone, unless `--flower-large`: it takes several times the size in each of its processes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

# A script's import path holds its own folder alone; benchmarks share modules.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from bulk_world import Run
from real_control import RealServer, Site
from tests.benchmarks._flower_side import FlowerSide, Tls
from tests.benchmarks._harness import Target, arguments, end_on_terminate, finish, interleaved, machine, spread, tell

from pathfed_client.transport.relay_certificate import make_certificate
from pathfed_common.encoder import weights
from pathfed_common.processes import ProcessSpec, Supervisor, accepts_connections, free_port
from pathfed_server import app
from pathfed_server.control import control_process
from pathfed_server.db.sql_store import SqlStore

_PEER = Path(__file__).with_name("_bulk_peer.py")
_TARGETS = {
    "down_over_plain": Target(">=", 0.8),
    "up_over_plain": Target(">=", 0.8),
    "over_flower": Target(">=", 4.0),
    "peak_mb": Target("<", 300.0),
}
_MB = 1_000_000


@dataclass
class Bench:
    """A server, a site, and what was measured.

    Attributes:
        seconds: by size (MB) and way, of each run.
        peaks: largest memory of a process, MB, by process.
    """

    root: Path
    server: RealServer
    site: Site
    control: int
    tunnel: int = 0
    seconds: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    def peer(self, *words: object) -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, str(_PEER), *map(str, words)], stdout=subprocess.PIPE, text=True)

    def ended(self, process: "subprocess.Popen[str]", name: str) -> float:
        """Seconds that it measured, once it has ended."""
        out, _ = process.communicate(timeout=900)
        if process.returncode:
            raise RuntimeError(f"{name} ended with {process.returncode}")
        said = json.loads(out)
        self.note_peak(name, said["peak_mb"])
        return float(said["seconds"])

    def note_peak(self, name: str, peak_mb: float) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0.0), round(peak_mb, 1))

    def note(self, size_mb: int, way: str, seconds: float) -> None:
        self.seconds.setdefault((size_mb, way), []).append(seconds)
        status = Path(f"/proc/{self.control}/status").read_text(encoding="ascii")
        self.note_peak("control", int(status.split("VmHWM:")[1].split()[0]) / 1000)

    def pathfed(self, run: Run, update: Path, size_mb: int, *, relay: bool = False) -> list[float]:
        """A base state down, then an update up; seconds of each."""
        shutil.rmtree(self.site.home.base_states, ignore_errors=True)
        for path in run.incoming.glob("north*"):
            path.unlink()
        offer = update.with_suffix(".offer")
        offer.write_bytes(run.offer("north").to_bytes())
        tunnel, name = (self.tunnel, "relay ") if relay else (0, "")
        home = self.site.home.root
        down = self.ended(self.peer("fetch", home, offer, tunnel), "site, fetching")
        self.note(size_mb, f"{name}down", down)
        up = self.ended(self.peer("deliver", home, offer, tunnel, update), "site, delivering")
        self.note(size_mb, f"{name}up", up)
        return [down, up]

    def plain(self, path: Path, size_mb: int) -> list[float]:
        """The same bytes over a socket, twice; seconds of each."""
        home, took = self.server.home, []
        for way, whole in (("plain down", "whole"), ("plain up", "shards")):
            port_file = self.root / "port"
            port_file.unlink(missing_ok=True)
            sender = self.peer("serve", port_file, home.tls_certificate, home.tls_key, path)
            while not port_file.exists():
                time.sleep(0.02)
            taken = self.root / "taken"
            receiver = self.peer("take", port_file.read_text(), home.ca_file, taken, whole)
            took.append(self.ended(receiver, "plain receiver"))
            self.note(size_mb, way, took[-1])
            self.ended(sender, "plain sender")
            taken.unlink()
        return took


def main() -> int:
    """Measure and print."""
    given = arguments(
        __doc__,
        ("--blocks", {"type": int, "help": "runs of each side"}),
        ("--sizes", {"type": int, "nargs": "+", "help": "MB"}),
        ("--relay", {"action": "store_true", "help": "also through a site's relay"}),
        ("--no-flower", {"action": "store_true", "help": "leave Flower's side out; its figure is then null, and its target not met"}),
        ("--flower-large", {"action": "store_true", "help": "Flower's side at the largest size, too"}),
    )
    end_on_terminate()
    given.blocks = given.blocks or (2 if given.quick else 5)
    given.sizes = given.sizes or ([48] if given.quick else [400, 2000])
    root = Path(tempfile.mkdtemp(prefix="pathfed-bulk-"))
    began = time.monotonic()
    try:
        figures = _measure(root, given)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    figures["wall_s"] = round(time.monotonic() - began, 1)
    return finish("bulk_transfer", figures, _TARGETS)


def _measure(root: Path, given: argparse.Namespace) -> dict[str, Any]:
    home = app.init(root / "server", consortium="test", host="127.0.0.1", listen="127.0.0.1", database="")
    supervisor = Supervisor()
    try:
        with SqlStore(home.database_url) as store:
            server = RealServer(home, store)
            supervisor.start(control_process(home))
            site = server.enrolled(root / "north", "north")
            bench = Bench(root, server, site, supervisor.pids()["control"])
            if given.relay:
                bench.tunnel = _relay(supervisor, site, root)
            for size_mb in given.sizes:
                _one_size(bench, given, size_mb)
            site.close()
            return _figures(bench, given)
    finally:
        supervisor.stop()


def _relay(supervisor: Supervisor, site: Site, root: Path) -> int:
    """A site's relay in a process of its own; the tunnel's port."""
    ports = free_port(), free_port()
    make_certificate(site.home.relay_files, "127.0.0.1", now=datetime.now(UTC))
    argv = [sys.executable, "-m", "pathfed_client.relaying", str(site.home.root), *map(str, ports)]
    ready = lambda: accepts_connections("127.0.0.1", ports[1])  # noqa: E731 - used once
    supervisor.start(ProcessSpec(name="relay", argv=argv, log=root / "relay.log", ready=ready))
    return ports[1]


def _one_size(bench: Bench, given: argparse.Namespace, size_mb: int) -> None:
    state, update = bench.root / "state", bench.root / f"update-{size_mb}"
    for path in (state, update):
        with path.open("wb") as file:
            for _ in range(size_mb):
                file.write(os.urandom(_MB))
    plan = bench.server.publish(bench.root, f"plan-{size_mb}")
    run = Run.begin(bench.server, f"run-{size_mb}", plan, ["north"], state, most_bytes=4 * 10**9)
    sides: dict[str, Any] = {
        "pathfed": lambda block: bench.pathfed(run, update, size_mb),
        "plain": lambda block: bench.plain(run.files.state(0), size_mb),
    }
    if given.relay:
        sides["relay"] = lambda block: bench.pathfed(run, update, size_mb, relay=True)
    bench.pathfed(run, update, size_mb)  # the server reads the state once for its manifest; the first site to ask waits for it
    first = {way: bench.seconds.pop((size_mb, way))[0] for way in ("down", "up")}
    tell(f"{size_mb} MB, first of all: {first}")
    bench.seconds[size_mb, "first down"] = [first["down"]]
    flowers: list[FlowerSide] = []
    try:
        if not given.no_flower and (size_mb == given.sizes[0] or given.flower_large):
            for each in (1, size_mb):
                flowers.append(_flower(bench, each))
                measure = partial(_flower_round, bench, flowers[-1], each)
                sides["Flower" if each == size_mb else "Flower, 1 MB"] = measure
                measure(given.blocks)  # its first round imports everything
                bench.seconds.pop((each, "Flower down"))
                bench.seconds.pop((each, "Flower up"))
        interleaved(sides, given.blocks, tell)
    finally:
        for side in flowers:
            side.stop()
    update.unlink()
    shutil.rmtree(run.files.state(0).parent)
    shutil.rmtree(run.incoming)


def _flower(bench: Bench, size_mb: int) -> FlowerSide:
    """A stock federation of one site whose model is one array of that size."""
    home = bench.server.home
    state = bench.root / f"flower-{size_mb}.safetensors"
    numbers = torch.randn(size_mb * _MB // 4, generator=torch.Generator().manual_seed(1))
    state.write_bytes(weights.dump({"all": numbers}, {}))
    tls = Tls(ca=home.ca_file, certificate=home.tls_certificate, key=home.tls_key)
    side = FlowerSide(bench.root / f"flower-{size_mb}", 1, 1, 0.0, state, tls, flat=True)
    side.start()
    return side


def _flower_round(bench: Bench, side: FlowerSide, size_mb: int, block: int) -> list[float]:
    """Seconds down and up of one round."""
    parts = side.measure(block)[0].parts()
    found = [parts["to_last_site_training"], parts["from_last_site_trained_to_replies"]]
    for way, took in zip(("down", "up"), found, strict=True):
        bench.note(size_mb, f"Flower {way}", took)
    return found


def _figures(bench: Bench, given: argparse.Namespace) -> dict[str, Any]:
    ours = {key: found for key, found in sorted(bench.seconds.items()) if not key[1].startswith("Flower")}
    rates = {f"{size_mb} MB {way}": spread([size_mb / one for one in found]) for (size_mb, way), found in ours.items()}

    def ratio(way: str) -> float:
        """The worst of the sizes: medians of interleaved runs."""
        return min(
            statistics.median(bench.seconds[size, f"plain {way}"]) / statistics.median(bench.seconds[size, way]) for size in given.sizes
        )

    def over_flower(size: int, way: str) -> float:
        """Flower's seconds beyond those of a round of 1 MB, over ours."""
        theirs, small = (statistics.median(bench.seconds[each, f"Flower {way}"]) for each in (size, 1))
        return (theirs - small) / statistics.median(bench.seconds[size, way])

    compared = [size for size in given.sizes if (size, "Flower up") in bench.seconds]
    by_way = {f"{size} MB {way}": round(over_flower(size, way), 2) for size in compared for way in ("down", "up")}
    peaks = [peak for name, peak in bench.peaks.items() if not name.startswith("plain")]
    return {
        "down_over_plain": round(ratio("down"), 3),
        "up_over_plain": round(ratio("up"), 3),
        "over_flower": min(by_way.values(), default=None),
        "over_flower_by_way": by_way,
        "peak_mb": max(peaks),
        "mb_s": rates,
        "flower_s": {f"{size} MB {way}": spread(found) for (size, way), found in bench.seconds.items() if way.startswith("Flower")},
        "peaks_mb": bench.peaks,
        "blocks": given.blocks,
        "machine": machine(),
    }


if __name__ == "__main__":
    sys.exit(main())
