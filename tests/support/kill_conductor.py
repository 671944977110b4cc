"""Kills processes of a running consortium at named instants, one case after another, and says what came of each."""

import json
import re
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from kill_world import KINDS, OPEN, RUN, World, find

from pathfed_common.ids import RunName
from pathfed_local.consortium import Consortium
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import RunState

_TICK_S = 0.02
_LOOK_S = 0.3
_STOPS_WITHIN_S = 20.0
#: Rounds that may pass an armed instant by before it counts as missed.
_ROUNDS = 2


@dataclass(frozen=True)
class Case:
    """Kill a process of `kind`, of `victim`, when a process of `owner` is at `instant`."""

    kind: str
    instant: str
    owner: str
    victim: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.victim} at {self.owner}'s '{self.instant}'"

    @property
    def name(self) -> str:
        """The instant's name in the folder."""
        return f"{self.instant}@{self.owner}"


@dataclass(kw_only=True)
class Happened:
    """What came of a case.

    Attributes:
        case: the case.
        round_index: the round that was going on.
        hit: whether the process stood at the instant when the victim was killed.
        goes_on_s: seconds from the kill to the commit of the round.
    """

    case: Case
    round_index: int
    hit: bool
    goes_on_s: float | None = None

    def line(self) -> str:
        """For a file of results."""
        return json.dumps(
            {
                "kind": self.case.kind,
                "instant": self.case.instant,
                "owner": self.case.owner,
                "victim": self.case.victim,
                "round": self.round_index,
                "hit": self.hit,
                "goes_on_s": None if self.goes_on_s is None else round(self.goes_on_s, 1),
            }
        )


@dataclass
class _Lane:
    """One owner's cases: one a round."""

    waiting: deque[Case]
    armed: Case | None = None
    since: int = -1
    open: tuple[Happened, float] | None = None


@dataclass
class Conductor:
    """Drives a consortium to the end of its run and kills on the way."""

    world: World
    made: Consortium
    cases: Sequence[Case]
    log: Path | None = None
    run: RunName = RUN
    happened: list[Happened] = field(default_factory=list)
    _committed: int = -1

    def __post_init__(self) -> None:
        owners = dict.fromkeys(case.owner for case in self.cases)
        self._lanes = {owner: _Lane(deque(case for case in self.cases if case.owner == owner)) for owner in owners}

    @property
    def left(self) -> list[Case]:
        """Cases that were not come to."""
        return [case for lane in self._lanes.values() for case in (*lane.waiting, *([lane.armed] if lane.armed else []))]

    def drive(self, within_s: float) -> RunState:
        """Go on until the run has ended or the time is up; its state."""
        until, look_at = time.monotonic() + within_s, 0.0
        state = RunState.PLANNED
        with SqlStore(ServerHome(self.made.server).database_url) as store:
            while time.monotonic() < until and state in OPEN:
                if time.monotonic() >= look_at:
                    self.made.watch(self.world.told.append)
                    state = store.run(self.run).state
                    self._note(_committed(store, self.run))
                    look_at = time.monotonic() + _LOOK_S
                for lane in self._lanes.values():
                    self._attend(lane, store)
                time.sleep(_TICK_S)
        self._close(None)
        return state

    def _note(self, committed: int) -> None:
        if committed != self._committed:
            self._committed = committed
            self._close(committed)

    def _close(self, committed: int | None) -> None:
        """Cases whose round is committed are over, and those whose instant has not come for rounds are missed."""
        for lane in self._lanes.values():
            if lane.open is not None:
                found, killed_at = lane.open
                if committed is None or committed > found.round_index - 1:
                    found.goes_on_s = None if committed is None else time.monotonic() - killed_at
                    self._write(found)
                    lane.open = None
            if lane.armed is not None and committed is not None and committed >= lane.since + _ROUNDS:
                with suppress(FileNotFoundError):
                    (self.world.instants / "armed" / lane.armed.name).unlink()
                    self._write(Happened(case=lane.armed, round_index=committed, hit=False))
                    lane.armed = None

    def _write(self, found: Happened) -> None:
        self.happened.append(found)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(found.line() + "\n")

    def _attend(self, lane: _Lane, store: SqlStore) -> None:
        if lane.armed is None and lane.open is None and lane.waiting and self._committed > lane.since:
            lane.armed, lane.since = lane.waiting.popleft(), self._committed
            (self.world.instants / "armed" / lane.armed.name).touch()
        elif lane.armed is not None:
            reached = self.world.instants / "reached" / lane.armed.name
            if reached.exists():
                self._note(_committed(store, self.run))
                self._kill(lane, lane.armed, reached)

    def _kill(self, lane: _Lane, case: Case, reached: Path) -> None:
        stopped = psutil.Process(int(reached.read_text()))
        hit = _stands(stopped)
        victims = find(self.made, case.kind, case.victim)
        killed_at = time.monotonic()
        for victim in victims[:1]:
            victim.send_signal(signal.SIGKILL)
        with suppress(psutil.Error):
            stopped.send_signal(signal.SIGCONT)
        reached.unlink()
        lane.armed = None
        if victims:
            lane.open = (Happened(case=case, round_index=self._committed + 1, hit=hit), killed_at)
        else:
            lane.waiting.append(case)  # it is being started again just now: the case waits for another round


def _committed(store: SqlStore, run: RunName) -> int:
    """Committed rounds of a run."""
    return max(0, len(store.checkpoints(run)) - 1)


def _stands(process: psutil.Process) -> bool:
    """Whether a process has stopped itself, within some seconds."""
    until = time.monotonic() + _STOPS_WITHIN_S
    while time.monotonic() < until:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_STOPPED:
                return True
        time.sleep(_TICK_S / 4)
    return False


#: kind -> how its end is told, by the command that owns it; "": to nobody, since a runner starts its own ones again.
_TELLING = {
    "server": r"PF903 server ended \(-9\) and is started again",
    "site": r"PF903 {victim} ended \(-9\) and is started again",
    "round loop": r"{victim}: PF903 run \S+: the round loop ended early",
    "fleet door": r"{victim}: PF903 fleet-door ended \(-9\) and is started again",
    "control plane": r"{victim}: PF903 control ended \(-9\) and is started again",
    "rank": "",
    "tile reader": "",
}


def is_told(case: Case, told: Sequence[str]) -> bool:
    """Whether the end of what a case killed was named."""
    pattern = _TELLING.get(case.kind, r"{victim}: PF\d+ {kind} ended \(-9\) and is started again")
    wanted = pattern.format(victim=re.escape(case.victim), kind=case.kind)
    return not wanted or any(re.match(wanted, line) for line in told)


def victim_of(kind: str, site: str) -> str:
    """Whose process a kind is, where the site is this one."""
    return "server" if KINDS[kind][1] == "server" else site
