"""kill -9 of either end in the middle of a transfer: real processes, shards of real size. What had arrived is not sent again."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bulk_world import Run, random_file
from real_control import RealServer, Site

from pathfed_client.io.egress_log import EgressLog
from pathfed_common.ids import SiteName
from pathfed_common.processes import accepts_connections
from pathfed_common.shards import SHARD_BYTES
from pathfed_server import app
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds import uploads

SIZE = SHARD_BYTES + 16 * 2**20
#: A site's process that fetches or delivers, at a pace at which a test can kill.
MOVING = """
import sys, time
from pathlib import Path
from pathfed_client.bulk import SiteBulk
from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.transport import bulk_client
from pathfed_common import part_file
from pathfed_common.part_file import manifest_of
from pathfed_common.protocol.messages import RoundOffer
way, home, offer, path, pause = sys.argv[1:]
read = bulk_client.read_piece
def slow(*place):
    time.sleep(float(pause))
    return read(*place)
bulk_client.read_piece = slow
write = part_file.PartFile.write
def written(self, piece):
    time.sleep(float(pause))
    write(self, piece)
part_file.PartFile.write = written
offer = RoundOffer.from_bytes(Path(offer).read_bytes())
with EgressLog(SiteHome(Path(home)).egress) as record:
    bulk = SiteBulk(SiteHome(Path(home)), Outlet(record))
    if way == "down":
        print(bulk.fetch(offer))
    else:
        bulk.deliver(Path(path), manifest_of(Path(path)), offer)
"""


class Plane:
    """A control plane in a process of its own, that is killed and started again."""

    def __init__(self, server: RealServer, log: Path) -> None:
        self._server, self._log = server, log
        self.start()

    def start(self) -> None:
        argv = [sys.executable, "-m", "pathfed_server.control", "--home", str(self._server.home.root)]
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=out)
        until(lambda: accepts_connections("127.0.0.1", self._server.home.settings.control_port), self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def until(seen: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    last = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < last
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[tuple[RealServer, Plane, Site]]:
    home = app.init(tmp_path / "server", consortium="test", host="127.0.0.1", listen="127.0.0.1", database="")
    with SqlStore(home.database_url) as store:
        server = RealServer(home, store)
        running = Plane(server, tmp_path / "control.log")
        try:
            site = server.enrolled(tmp_path / "north", "north")
            yield server, running, site
            site.close()
        finally:
            running.kill()


def moving(way: str, site: Site, run: Run, path: Path, pause: float) -> "subprocess.Popen[bytes]":
    offer = path.with_name("offer")
    offer.write_bytes(run.offer("north").to_bytes())
    argv = [sys.executable, "-c", MOVING, way, str(site.home.root), str(offer), str(path), str(pause)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: "subprocess.Popen[bytes]") -> None:
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, (out, errors.decode())


@pytest.mark.parametrize("who", ["the control plane", "the site"])
def test_an_upload_goes_on_after_a_kill(plane, tmp_path, who):
    server, control, site = plane
    run = Run.begin(server, "up", server.publish(tmp_path, "up"), ["north"], b"state")
    path, part = random_file(tmp_path / "update", SIZE), run.incoming / "north.part"
    process = moving("up", site, run, path, 0.01)
    until(lambda: part.exists() and part.stat().st_size > SHARD_BYTES)
    if who == "the site":
        process.kill()
        process.communicate()
        process = moving("up", site, run, path, 0)
    else:
        control.kill()
        control.start()
    finished(process)
    assert uploads.arrived(run.incoming, SiteName("north")).read_bytes() == path.read_bytes()
    with EgressLog(site.home.egress) as record:
        again = sum(entry.sent.size for entry in record.entries() if entry.sent.kind == "update-again")
    assert again <= SIZE - SHARD_BYTES, "the shard that was whole was not sent again"


def test_a_download_goes_on_after_kills_of_both(plane, tmp_path):
    server, control, site = plane
    state = os.urandom(SIZE)
    run = Run.begin(server, "down", server.publish(tmp_path, "down"), ["north"], state)
    part = site.home.base_states / f"{run.digest[7:]}.part"
    process = moving("down", site, run, tmp_path / "none", 0.01)
    until(lambda: part.exists() and part.stat().st_size > 8 * 2**20, process)
    control.kill()
    control.start()
    until(lambda: part.exists() and part.stat().st_size > SHARD_BYTES, process)
    process.kill()
    process.communicate()
    held = part.stat().st_size
    assert held > SHARD_BYTES
    finished(moving("down", site, run, tmp_path / "none", 0))
    assert (site.home.base_states / f"{run.digest[7:]}.safetensors").read_bytes() == state
