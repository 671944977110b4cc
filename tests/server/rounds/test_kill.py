"""A loop killed at any instant goes on from the last committed round and ends with the same states, statements and record.

The instants are after every call of a port, every file made whole, every folder removed, and every step told to the watcher: between two of
them nothing outside the process changes. A kill is an exception that none of the loop's code catches; the next loop starts with nothing but
the disk and the database.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.server.rounds.consortium import KEYS, NAMES, RUN, Consortium, FakeClock, FakeRecorder, FakeSites, Make, make_plan

from pathfed_common import digest
from pathfed_common.ids import SiteName
from pathfed_common.provenance import record
from pathfed_common.provenance.documents import SiteCard
from pathfed_server.provenance.recorder import Recorder
from pathfed_server.rounds.loop import run_rounds
from pathfed_server.rounds.ports import Consent, Offer, Reply, RunRecorder, Sending
from pathfed_server.rounds.state import RunState

PLAN = make_plan(rounds=2, quorum=2)
SITES = NAMES[:2]


class Killed(BaseException):
    """The process ends here."""


class Fuse:
    """Counts instants and kills at one of them."""

    def __init__(self, at: int | None) -> None:
        self.left = at
        self.seen: list[str] = []

    def __call__(self, instant: str) -> None:
        self.seen.append(instant)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed(instant)

    def after(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            self(f"after {name}")
            return result

        return guarded


class Guarded:
    """A port with a fuse after each of its methods."""

    def __init__(self, port: object, fuse: Fuse) -> None:
        self._port, self._fuse = port, fuse

    def __getattr__(self, name: str) -> Any:
        return self._fuse.after(name, getattr(self._port, name))


class GuardedSites:
    """Sites with a fuse before and after the replies, and at each."""

    def __init__(self, sites: FakeSites, fuse: Fuse) -> None:
        self._sites, self._fuse = sites, fuse

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent, sending: Sending) -> Iterator[Reply]:
        self._fuse("before the offers")
        for reply in self._sites.exchange(offers, spool, withheld=withheld, sending=sending):
            self._fuse(f"reply of {reply.site}")
            yield reply
        self._fuse("after the replies")


def drive_until(made: Consortium, fuse: Fuse, recorder: RunRecorder | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fuse.after("rename", os.replace))
        patch.setattr(shutil, "rmtree", fuse.after("remove", shutil.rmtree))
        store: Any = Guarded(made.store, fuse)
        recording: Any = Guarded(recorder or made.recorder, fuse)
        run_rounds(
            made.settings(),
            sites=GuardedSites(made.sites, fuse),
            store=store,
            recorder=recording,
            clock=made.clock,
            progress=lambda told: fuse(f"told {told.stage} {told.round_index}"),
        )


def end_of(made: Consortium) -> object:
    """Everything that must not depend on a kill; times and the number of attempts may."""
    record = {
        index: (result.checkpoint, result.base_state, result.weights, statements, approvals)
        for index, (result, statements, approvals) in made.recorder.rounds.items()
    }
    files = sorted(path.relative_to(made.home).as_posix() for path in (made.home / "runs").rglob("*") if path.is_file())
    shown = [
        (row.site, row.state, row.code, row.update, row.statement) for index in (1, 2) for row in made.store.participations(RUN, index)
    ]
    return (
        made.store.checkpoints(RUN),
        [(row.round_index, row.site, row.digest) for row in made.store.statements(RUN)],
        record,
        made.recorder.finished[-1],
        shown,
        files,
        made.store.run(RUN).state,
        made.store.quarantined(RUN),
        made.store.log_leaves(0, made.store.log_size()),
    )


class Planned:
    """A consortium with a planned run that can be put back to where it began, again and again."""

    def __init__(self, consortium: Make) -> None:
        self.made = consortium(PLAN, sites=SITES)
        self._snapshot = self.made.home.with_name("snapshot")
        shutil.copytree(self.made.home, self._snapshot)

    def again(self) -> Consortium:
        """The same consortium, nothing driven yet. Only the database's address outlives a kill, so the store may stay."""
        shutil.rmtree(self.made.home)
        shutil.copytree(self._snapshot, self.made.home)
        clock = FakeClock()
        return replace(self.made, clock=clock, sites=FakeSites(PLAN, clock), recorder=FakeRecorder(), told=[])

    def undisturbed(self) -> tuple[list[str], object]:
        """Every instant of a run that nothing disturbs, and its end."""
        made, fuse = self.again(), Fuse(None)
        drive_until(made, fuse)
        return fuse.seen, end_of(made)


def test_loop_killed_at_any_instant_ends_as_an_undisturbed_one(consortium: Make) -> None:
    planned = Planned(consortium)
    seen, undisturbed = planned.undisturbed()
    assert len(seen) > 60
    for at, instant in enumerate(seen):
        made = planned.again()
        with pytest.raises(Killed):
            drive_until(made, Fuse(at))
        if made.store.run(RUN).state is not RunState.FINISHED:
            drive_until(made, Fuse(None))
        assert end_of(made) == undisturbed, f"killed at instant {at}, {instant}"


def test_loop_killed_again_and_again_still_ends_the_same(consortium: Make) -> None:
    planned = Planned(consortium)
    _, undisturbed = planned.undisturbed()
    for stride in (12, 21):
        made = planned.again()
        kills = 0
        while made.store.run(RUN).state is not RunState.FINISHED:
            try:
                drive_until(made, Fuse(stride + kills))
            except Killed:
                kills += 1
            assert kills < 200
        assert kills >= 3
        assert end_of(made) == undisturbed


def test_no_site_is_asked_twice_for_what_was_admitted(consortium: Make) -> None:
    planned = Planned(consortium)
    seen, _ = planned.undisturbed()
    made = planned.again()
    with pytest.raises(Killed):
        drive_until(made, Fuse(seen.index("told collected 1")))
    drive_until(made, Fuse(None))
    assert made.sites.asked == [(site, index) for index in (1, 2) for site in SITES]


def record_of(folder: Path) -> dict[str, bytes]:
    """A record's files but for those that hold times: round records, and the manifest that lists their digests."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {place: path.read_bytes() for place, path in files.items() if not place.startswith("rounds/") and place != record.MANIFEST}


def test_real_record_survives_kills_and_lists_what_it_holds(consortium: Make) -> None:
    """Every third instant, and each time a new recorder on the folder that the killed one left."""
    planned = Planned(consortium)
    server = KEYS[SiteName("server")]
    cards = {
        name: SiteCard(site=name, evidence_key=KEYS[name].public, flower_key=f"ssh-ed25519 {name}").to_bytes(KEYS[name]) for name in SITES
    }

    def drive(made: Consortium, at: int | None) -> list[str]:
        fuse = Fuse(at)
        drive_until(made, fuse, Recorder(made.home / "record", server, cards, retain_updates=True))
        return fuse.seen

    made = planned.again()
    seen = drive(made, None)
    undisturbed = record_of(made.home / "record")
    assert any(place.startswith("updates/") for place in undisturbed)
    for at in range(0, len(seen), 3):
        made = planned.again()
        with pytest.raises(Killed):
            drive(made, at)
        if made.store.run(RUN).state is not RunState.FINISHED:
            drive(made, None)
        folder = made.home / "record"
        assert record_of(folder) == undisturbed, f"killed at instant {at}, {seen[at]}"
        manifest = record.Manifest.from_bytes((folder / record.MANIFEST).read_bytes())
        assert all(digest.of_bytes((folder / each.path).read_bytes()) == each.digest for each in manifest.files)
        assert {each.path for each in manifest.files} == {*undisturbed, record.round_path(1), record.round_path(2)}
