"""Base states and updates over lines that are cut, slow, far away, half-open or reset: the right bytes arrive, and only what was on the way
is sent again.

The real client, the real server and mutual TLS, with a proxy of ours between them.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bulk_world import Run, bulk_of, random_file
from fault_proxy import FaultProxy, fault_proxy
from real_control import RealServer, Site, serving_in

from pathfed_client.bulk import SiteBulk
from pathfed_common import digest, shards
from pathfed_common.errors import TransportError
from pathfed_common.ids import SiteName
from pathfed_common.part_file import manifest_of
from pathfed_server.rounds import uploads

SHARD, PIECE = 64 * 1024, 8 * 1024
#: Of a handshake and the calls of one connection, bytes, either way.
_TALK = 12_000
NORTH = SiteName("north")
#: Connections of a transfer that nothing disturbs: the list of a state's shards has one of its own.
UNDISTURBED = {"up": 1, "down": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards, so that a file of many is small."""
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD)
    monkeypatch.setattr(shards, "PIECE_BYTES", PIECE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with serving_in(tmp_path_factory.mktemp("real") / "server") as running:
        yield running


@pytest.fixture(scope="module")
def site(server: RealServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = server.enrolled(tmp_path_factory.mktemp("site") / "north", "north")
    yield made
    made.close()


@pytest.fixture
def begin(server: RealServer, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[bytes], Run]:
    def make(state: bytes) -> Run:
        name = digest.short(digest.of_bytes(request.node.name.encode()))
        return Run.begin(server, f"r{name}", server.publish(tmp_path, f"p{name}"), ["north"], state)

    return make


@pytest.fixture
def line(site: Site) -> Iterator[FaultProxy]:
    with fault_proxy(to=site.home.server_card.control_address) as made:
        yield made


def patient(site: Site, line: FaultProxy) -> SiteBulk:
    """On the machine's clock, with pauses a tenth as long."""
    return bulk_of(site, tunnel=line.port, now=lambda: 2.0, sleep=lambda seconds: time.sleep(seconds / 10))


def carried(line: FaultProxy) -> tuple[int, int]:
    return sum(line.up.values()), sum(line.down.values())


class Transfer(threading.Thread):
    """An upload or a download under way."""

    def __init__(self, way: str, bulk: SiteBulk, run: Run, update: Path) -> None:
        super().__init__(daemon=True)
        self._work: Callable[[], Any] = {
            "up": lambda: bulk.deliver(update, manifest_of(update), run.offer("north")),
            "down": lambda: bulk.fetch(run.offer("north")),
        }[way]
        self.failed: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failed = error

    def done(self, within_s: float) -> None:
        self.join(within_s)
        assert not self.is_alive(), "it hangs"
        if self.failed is not None:
            raise self.failed


def until(look: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not look():
        assert time.monotonic() < end
        time.sleep(0.01)


def arrived(way: str, site: Site, run: Run, update: Path) -> bool:
    if way == "up":
        there = uploads.arrived(run.incoming, NORTH)
        return there is not None and there.read_bytes() == update.read_bytes()
    return run.state in [path.read_bytes() for path in site.home.base_states.iterdir() if path.is_file()]


FAULTS: dict[str, Callable[[FaultProxy], None]] = {
    "cut": FaultProxy.cut,
    "reset": FaultProxy.reset_open,
    "half-open for a while": FaultProxy.silence,
}
long = pytest.mark.skipif(not os.environ.get("CHAOS"), reason="waits for minutes: runs with `make chaos`")


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_line_that_fails_in_mid_shard_costs_what_was_on_the_way_and_is_told(fault, way, begin, site, line, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "pathfed_client.bulk")
    size = 6 * SHARD
    run, update = begin(os.urandom(size)), random_file(tmp_path / "update", size)
    line.bytes_per_s = 200_000.0  # so that there is a middle
    moving = Transfer(way, patient(site, line), run, update)
    until(lambda: carried(line)[way == "down"] > 2.5 * SHARD)
    FAULTS[fault](line)
    time.sleep(1.5)  # a while; what is still open stands still meanwhile
    line.mend()
    moving.done(60)
    assert arrived(way, site, run, update)
    assert carried(line)[way == "down"] < size + 2 * SHARD + _TALK * sum(line.opened.values())
    assert ("a transfer was cut (PF403); it goes on from where it was" in caplog.messages) == (fault in ("cut", "reset"))


@long
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_connection_that_is_half_open_for_good_is_given_up_within_two_minutes(way, begin, site, line, tmp_path) -> None:
    """By gRPC's ping after a minute, or at the latest when the stream's time is up; then another connection goes on."""
    size = 6 * SHARD
    run, update = begin(os.urandom(size)), random_file(tmp_path / "update", size)
    line.bytes_per_s = 200_000.0
    moving = Transfer(way, patient(site, line), run, update)
    until(lambda: carried(line)[way == "down"] > 2.5 * SHARD)
    line.strand()
    line.bytes_per_s = None
    moving.done(150)
    assert arrived(way, site, run, update)


@pytest.mark.parametrize("way", ["up", "down"])
def test_half_a_second_of_latency_costs_round_trips_and_no_more(way, begin, site, line, tmp_path) -> None:
    size = 8 * SHARD
    run, update = begin(os.urandom(size)), random_file(tmp_path / "update", size)
    line.latency_s = 0.25
    begun = time.monotonic()
    Transfer(way, patient(site, line), run, update).done(120)
    assert arrived(way, site, run, update)
    assert sum(line.opened.values()) == UNDISTURBED[way], "nobody gave up"
    # A round trip for each shard here, of 64 kB; of real ones, of 64 MB, for each of those.
    assert time.monotonic() - begun < 0.5 * (8 + 12) + 20


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_line_of_one_megabit_is_used_and_not_given_up(way, begin, site, line, tmp_path) -> None:
    size = 6 * SHARD
    run, update = begin(os.urandom(size)), random_file(tmp_path / "update", size)
    line.bytes_per_s = 125_000.0
    begun = time.monotonic()
    Transfer(way, patient(site, line), run, update).done(120)
    assert arrived(way, site, run, update)
    assert time.monotonic() - begun > size / 125_000.0 * 0.9
    assert sum(line.opened.values()) == UNDISTURBED[way]
    assert carried(line)[way == "down"] < size * 1.05 + _TALK


@long
def test_a_line_that_accepts_and_never_answers_is_given_up_at_the_deadline(begin, site, line) -> None:
    run = begin(os.urandom(SHARD))
    line.silence()
    clock = iter(range(1000))
    bulk = bulk_of(site, tunnel=line.port, now=lambda: float(next(clock)), sleep=lambda seconds: None)
    with pytest.raises(TransportError, match="PF465"):
        bulk.fetch(run.offer("north", deadline=3.0))
