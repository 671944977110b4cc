"""Kills processes of a running consortium at named instants, one case after another, and says what came of each."""

import json
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from kill_world import KINDS, OPEN, RUN, World, find, processes

from pathfed_common.ids import RunName
from pathfed_local.consortium import Consortium
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import Checkpoint, RunState

_TICK_S = 0.02
_LOOK_S = 0.3
_STOPS_WITHIN_S = 20.0
#: The kind of a case that kills every process of everybody, as when a machine loses power.
EVERYTHING = "everything"
#: Rounds that may pass an armed instant by before it counts as missed, and how often a case is missed before it is given up. A rank trains
#: only when a patient was drawn, and one round in eleven draws none (2 of 6 expected).
_ROUNDS, _CHANCES = 2, 3


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
    """Drives a consortium to the end of its run and kills on the way.

    Attributes:
        world: where it is.
        made: its processes.
        cases: whom to kill; each owner's in this order, one a round, those of several owners beside each other.
        log: a file that each case's result is appended to.
        run: the run.
        reference: the states of a run that nobody disturbed.
        one_at_a_time: one case in every other round, whoever is its owner.
        happened: what came of the cases.
    """

    world: World
    made: Consortium
    cases: Sequence[Case]
    log: Path | None = None
    run: RunName = RUN
    reference: Sequence[Checkpoint] = ()
    one_at_a_time: bool = False
    happened: list[Happened] = field(default_factory=list)
    _committed: int = -1
    _missed: Counter[Case] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        lanes = dict.fromkeys("" if self.one_at_a_time else case.owner for case in self.cases)
        self._lanes = {lane: _Lane(deque(case for case in self.cases if lane in ("", case.owner))) for lane in lanes}

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
                    self.compare(store)
                    self._note(_committed(store, self.run))
                    look_at = time.monotonic() + _LOOK_S
                for lane in self._lanes.values():
                    self._attend(lane, store)
                time.sleep(_TICK_S)
        self._close(None)
        return state

    def compare(self, store: SqlStore) -> None:
        """A state that is not the reference's ends the run at once: what follows from it says nothing."""
        found = store.checkpoints(self.run)
        wrong = [mine.round_index for mine, due in zip(found, self.reference, strict=False) if mine != due]
        assert not wrong, f"round {wrong[0]} ended with another state than when nothing is killed; {self.report()}"

    def report(self) -> str:
        """What was done, and what the processes said."""
        return "\n".join([*(found.line() for found in self.happened), *self.world.told])

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
                    self._miss(lane, lane.armed, committed)
                    lane.armed = None

    def _miss(self, lane: _Lane, case: Case, committed: int) -> None:
        self._missed[case] += 1
        if self._missed[case] < _CHANCES:
            lane.waiting.append(case)
        else:
            self._write(Happened(case=case, round_index=committed, hit=False))

    def _write(self, found: Happened) -> None:
        self.happened.append(found)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(found.line() + "\n")

    def _attend(self, lane: _Lane, store: SqlStore) -> None:
        pause = 1 if self.one_at_a_time else 0
        if lane.armed is None and lane.open is None and lane.waiting and self._committed > lane.since + pause:
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
        victims = self._victims(case)
        killed_at = time.monotonic()
        for victim in victims:
            with suppress(psutil.Error):  # another's end has ended it
                victim.send_signal(signal.SIGKILL)
        with suppress(psutil.Error):
            stopped.send_signal(signal.SIGCONT)
        reached.unlink()
        lane.armed = None
        if victims:
            lane.open = (Happened(case=case, round_index=self._committed + 1, hit=hit), killed_at)
        else:
            lane.waiting.append(case)  # it is being started again just now: the case waits for another round

    def _victims(self, case: Case) -> list[psutil.Process]:
        if case.kind != EVERYTHING:
            return find(self.made, case.kind, case.victim)[:1]
        every = [process for owner in self.made.pids() for process in processes(self.made, owner)]
        for process in every:  # none sees another end
            with suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)
        return every


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
    EVERYTHING: "",
}


def is_told(case: Case, told: Sequence[str]) -> bool:
    """Whether the end of what a case killed was named."""
    pattern = _TELLING.get(case.kind, r"{victim}: PF\d+ {kind} ended \(-9\) and is started again")
    wanted = pattern.format(victim=re.escape(case.victim), kind=case.kind)
    return not wanted or any(re.match(wanted, line) for line in told)


def victim_of(kind: str, site: str) -> str:
    """Whose process a kind is, where the site is this one."""
    return "server" if kind == EVERYTHING or KINDS[kind][1] == "server" else site
