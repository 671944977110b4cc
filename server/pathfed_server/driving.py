"""The round loop's process: wires the loop to Flower, the database and the record, and runs it to the end of a run."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from flwr.serverapp import Grid

from pathfed_common import files
from pathfed_common.errors import ErrorCode, PathfedError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.model import initial_state, state_shapes
from pathfed_common.provenance.documents import SiteCard
from pathfed_server.daemon import note_server_app
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.encoders import stored_encoder
from pathfed_server.home import ServerHome
from pathfed_server.provenance.recorder import Recorder
from pathfed_server.rounds.loop import run_rounds
from pathfed_server.rounds.ports import Consent, Offer, Reply, Sending
from pathfed_server.rounds.progress import Progress
from pathfed_server.rounds.settings import RunSettings
from pathfed_server.rounds.state import SiteState
from pathfed_server.transport.flower_control import node_key
from pathfed_server.transport.flower_server import FlowerSites

_log = logging.getLogger(__name__)
_PARENT_POLL_S = 1.0
#: What passes without anybody touching the run.
_PASSING = (ErrorCode.DISK_FULL, ErrorCode.DATABASE_UNAVAILABLE)
#: Pauses before the run is taken up again, seconds; `_LONGEST_S` after them.
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_LONGEST_S = 60.0


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """UTC seconds."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


def drive(home: ServerHome, run: RunName, flower_run: int, grid: Grid) -> None:
    """Drive a run from its last committed round to its end, as Flower's run of this number.

    A full disk and a database that is away are waited for: the run is taken up again from its last committed round when they have passed,
    and neither uses up one of the daemon's attempts.

    Raises:
        PathfedError: the run cannot go on; the database says so too where that is possible.
    """
    _log_to(home.logs / "server-app.log")
    end_with_parent()
    # The server's arithmetic is bound by memory, tensor by tensor; more threads would only wait for each other beside other processes.
    torch.set_num_threads(1)
    try:
        outlast(lambda: _drive(home, run, flower_run, grid), time.sleep)
    except PathfedError as error:
        _log.error("%s", error)
        raise


def outlast(work: Callable[[], None], sleep: Callable[[float], None]) -> None:
    """Do work that may be begun anew, again and again while a full disk (PF901) or an absent database (PF512) is in its way.

    Raises:
        PathfedError: anything else that is in its way.
    """
    pauses, told = iter(_PAUSES_S), ""
    while True:
        begun = time.monotonic()
        try:
            return work()
        except PathfedError as error:
            if error.code not in _PASSING:
                raise
            if time.monotonic() - begun > _LONGEST_S:
                pauses, told = iter(_PAUSES_S), ""  # what was told before had passed meanwhile
            if str(error) != told:
                told = str(error)
                _log.warning("%s; waiting, then going on from the last committed round", error)
        sleep(next(pauses, _LONGEST_S))


def _drive(home: ServerHome, run: RunName, flower_run: int, grid: Grid) -> None:
    note_server_app(home, run, flower_run)
    with SqlStore(home.database_url) as store:
        plan = store.plan(store.run(run).plan).plan()
        cards = _Cards(home, store)
        for site in store.run(run).sites:
            cards[site]  # a card that is missing ends the run here, before any site is asked
        settings = RunSettings(
            run=run,
            plan=plan,
            shapes=state_shapes(plan),
            initial_state=lambda: initial_state(plan, stored_encoder(home, plan)),
            key=home.evidence_key,
            home=home.root,
            suspend_after=home.settings.suspend_after,
        )
        outcome = run_rounds(
            settings,
            sites=_FlowerSites(grid, store),
            store=store,
            recorder=Recorder(home.record(run), home.evidence_key, cards, retain_updates=home.settings.retain_updates),
            clock=SystemClock(),
            progress=_tell,
        )
        _log.info("run %s: %s", run, outcome.state.value)


class _FlowerSites:
    """Implements `SitePort`: looks up the sites' nodes anew for each exchange, as sites may join between rounds."""

    def __init__(self, grid: Grid, store: SqlStore) -> None:
        self._grid, self._store = grid, store

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent, sending: Sending) -> Iterator[Reply]:
        """See `SitePort`."""
        nodes = {site.name: node_key(site.flower_key) for site in self._store.sites() if site.state is SiteState.ENROLLED}
        return FlowerSites(self._grid, nodes).exchange(offers, spool, withheld=withheld, sending=sending)


class _Cards(Mapping[SiteName, bytes]):
    """The cards of all sites, each read when it is asked for."""

    def __init__(self, home: ServerHome, store: SqlStore) -> None:
        self._home, self._store = home, store

    def __getitem__(self, site: SiteName) -> bytes:
        """A site's card.

        Raises:
            KeyError: no such site.
            HostError: PF904, its card is not there.
        """
        if site not in list(self):
            raise KeyError(site)
        return _card(self._home, self._store, site)

    def __iter__(self) -> Iterator[SiteName]:
        """Every site's name."""
        return (row.name for row in self._store.sites())

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self._store.sites())


def _card(home: ServerHome, store: SqlStore, site: SiteName) -> bytes:
    """A site's card. Where an admission was cut short after its commit, it is put in place from the admitted request."""
    place = home.site_card_file(site)
    if not place.exists():
        for asked in store.enrolments("admitted"):
            if store.site(site).is_of(SiteCard.from_bytes(asked.site_card)):
                files.write_atomic(place, asked.site_card)
    return home.site_card(site)


def end_with_parent() -> None:
    """Let this process end, within a second or so, when the one that started it does.

    A killed superexec would leave the loop running beside the next attempt at the same run. The loop may end at any instant.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        _log.error("the process that started the round loop has ended: so does the loop")
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _tell(progress: Progress) -> None:
    parts = [f"run {progress.run}: round {progress.round_index} of {progress.rounds} {progress.stage.value}"]
    parts += [str(part) for part in (progress.site, progress.outcome, progress.code) if part]
    _log.info(" ".join(parts))


def _log_to(path: Path) -> None:
    """Log into a file of our own: superexec throws the ServerApp's output away."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("pathfed_server")
    root.setLevel(logging.INFO)
    root.addHandler(handler)
