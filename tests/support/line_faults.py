"""A site's line to the server and what goes wrong with it in the course of one round, each at a moment of the round that it names.

A fault waits for its moment, does what it does, and ends when the line is well again. It runs in a thread of its own, so that several
sites have theirs in the same round.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import psutil
from fault_proxy import FaultProxy
from packet_capture import Building

#: Longer than Flower waits for a SuperNode's heartbeat, and longer than any call of ours waits for its answer.
CUT_S = 130.0
SILENT_S = 60.0
ONE_MBIT_S = 125_000.0
FAR_S = 0.5
#: So that a file has a middle: some seconds of a base state.
_UNHURRIED = 4e6
_MOMENT_WITHIN_S = 400.0
_LOOK_S = 0.01


@dataclass
class Line:
    """One site's line.

    Attributes:
        site: whose it is.
        proxy: what it goes through.
        instants: where instants are armed; see `pathfed_instants`.
        base_state: bytes of one.
        update: bytes of one.
        building: where the site is, behind a wire of its own; None: on this machine's loopback.
        over: set when the round is over.
        moved: by way, what the line had carried when the round began.
        logs: the folder of the site's logs.
    """

    site: str
    proxy: FaultProxy
    instants: Path
    base_state: int = 0
    update: int = 0
    building: Building | None = None
    over: Event = field(default_factory=Event)
    moved: dict[str, int] = field(default_factory=dict)
    logs: Path = Path()
    _read_to: dict[str, int] = field(default_factory=dict)

    def within(self) -> list[str]:
        """The words that a site's start has before it, so that this line is its only one, or the one that it is told of."""
        if self.building is None:
            return ["env", f"https_proxy=http://127.0.0.1:{self.proxy.port}"]
        return self.building.command("env", f"https_proxy=http://{self.building.outside}:{self.proxy.port}")

    def begin_round(self) -> None:
        """Note where the line stands: nothing of the round has been moved."""
        self.over.clear()
        self.moved = {"up": self._carried("up"), "down": self._carried("down")}
        self._read_to = {log.stem: log.stat().st_size for log in self.logs.glob("*.log")}

    def said(self, process: str) -> str:
        """What one of the site's processes has logged in this round."""
        return (self.logs / f"{process}.log").read_bytes()[self._read_to.get(process, 0) :].decode(errors="replace")

    def carried(self, way: str) -> int:
        """Bytes carried in this round, up or down."""
        return self._carried(way) - self.moved[way]

    def wait_for(self, look: Callable[[], object], what: str) -> None:
        """Wait for a moment of the round."""
        until = time.monotonic() + _MOMENT_WITHIN_S
        while not look():
            assert time.monotonic() < until, f"{self.site}: {what} has not come"
            time.sleep(_LOOK_S)

    def middle_of_the_base_state(self) -> None:
        """Wait until about a third of it has come."""
        self.proxy.bytes_per_s = _UNHURRIED
        self.wait_for(lambda: self.carried("down") > self.base_state / 3, "the middle of the base state")

    def middle_of_the_update(self, share: float = 1 / 3) -> None:
        """Wait until about a third of it has gone."""
        self.proxy.bytes_per_s = _UNHURRIED / 4
        self.wait_for(lambda: self.carried("up") > self.update * share, "the middle of the update")

    @contextmanager
    def standing_at(self, instant: str) -> Iterator[None]:
        """Have the site's process stand at an instant for as long as this lasts."""
        name = f"{instant}@{self.site}"
        arm(self.instants, name)
        with standing(self.instants, name):
            yield

    def _carried(self, way: str) -> int:
        return sum((self.proxy.up if way == "up" else self.proxy.down).values())


def arm(instants: Path, name: str) -> None:
    """Have the next process that comes to an instant stop there."""
    (instants / "armed" / name).touch()


@contextmanager
def standing(instants: Path, name: str) -> Iterator[None]:
    """Wait until a process stands at an armed instant; it goes on afterwards."""
    reached = instants / "reached" / name
    until = time.monotonic() + _MOMENT_WITHIN_S
    while not reached.exists():
        assert time.monotonic() < until, f"nobody has come to {name}"
        time.sleep(_LOOK_S)
    process = int(reached.read_text())
    try:
        yield
    finally:
        reached.unlink()
        while psutil.Process(process).status() != psutil.STATUS_STOPPED:  # it says so before it stops
            time.sleep(_LOOK_S)
        os.kill(process, signal.SIGCONT)


def cut_while_it_trains(line: Line) -> None:
    """The line is cut when the private step begins, and is there again minutes after it has ended."""
    with line.standing_at("training"):
        line.proxy.cut()
    time.sleep(CUT_S)
    line.proxy.mend()


def cut_while_the_update_travels(line: Line) -> None:
    """The line is cut with a third of the update over."""
    line.middle_of_the_update()
    line.proxy.cut()
    time.sleep(CUT_S)
    line.proxy.mend()


def reset_in_mid_shard(line: Line) -> None:
    """What is open is reset in the middle of the base state and of the update; the connection after that is, too, soon after."""
    line.middle_of_the_base_state()
    line.proxy.reset_open()
    line.middle_of_the_update()
    line.proxy.resets.append(line.update // 8)
    line.proxy.reset_open()
    line.proxy.bytes_per_s = None


def one_megabit(line: Line) -> None:
    """The whole round has a line of 1 Mbit/s, each way."""
    line.proxy.bytes_per_s = ONE_MBIT_S
    line.over.wait()
    line.proxy.mend()


def far_away(line: Line) -> None:
    """For the whole round every byte takes half a second longer, each way."""
    line.proxy.latency_s = FAR_S
    line.over.wait()
    line.proxy.mend()


def half_open_for_good(line: Line) -> None:
    """Every connection goes half-open in the middle of the base state, and again in the middle of the update; new ones work."""
    line.middle_of_the_base_state()
    line.proxy.strand()
    line.middle_of_the_update()
    line.proxy.strand()
    line.proxy.bytes_per_s = None


def silent_for_a_minute(line: Line) -> None:
    """Nothing passes for a minute, in the middle of the base state and again in the middle of the update; nobody is told."""
    for middle in (line.middle_of_the_base_state, line.middle_of_the_update):
        middle()
        line.proxy.silence()
        time.sleep(SILENT_S)
        line.proxy.mend()


def wire_down(line: Line) -> None:
    """The wire itself is cut in the middle of the update: packets are lost, and nobody is told."""
    assert line.building is not None
    line.middle_of_the_update()
    line.building.cut()
    time.sleep(CUT_S)
    line.building.join()
    line.proxy.mend()
