"""What the round loop needs from the world, as ports: messages to sites, a clock, the truth about rounds, and the record.

The loop is pure apart from them and the files of the server's home. `transport` implements `SitePort` on Flower, `db` implements
`RoundStore` on SQL, `provenance` implements `RunRecorder`; tests may implement `SitePort` in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.plan import Plan
from pathfed_server.rounds.machine import RoundEvent
from pathfed_server.rounds.state import (
    Candidate,
    Checkpoint,
    Participation,
    Quarantined,
    RoundOpening,
    RoundResult,
    RunProgress,
    RunState,
)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One site's round offer, ready to send.

    Attributes:
        site: the receiver.
        envelope: the signed `RoundOffer` (DSSE bytes).
        deadline: UTC seconds after which a reply does not count.
    """

    site: SiteName
    envelope: bytes
    deadline: float


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back from one site: an update with its statement, or a code.

    Attributes:
        site: the sender, as the transport authenticated it.
        code: the site's refusal or failure code, or None when it sent an update.
        statement: the signed statement (DSSE bytes), or None.
        update: the file in which the update has arrived, or None.
        received_at: UTC seconds when update and statement were both here.
        transfer_s: seconds from the announcement of the update to its last byte on disk, cuts and pauses included.
    """

    site: SiteName
    code: str | None
    statement: bytes | None
    update: Path | None
    received_at: float
    transfer_s: float


#: Why nothing may be sent to a site now, as a code, or None: asked of the store at the moment of sending.
Consent = Callable[[SiteName], str | None]

#: Told of each site whose offer is about to be handed to the network.
Sending = Callable[[SiteName], None]


class SitePort(Protocol):
    """Sends offers and brings replies back, one at a time."""

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent, sending: Sending) -> Iterator[Reply]:
        """Send the offers, then yield each reply as it arrives, its update already in a file under `spool` (`rounds.uploads`).

        MUST yield at most one reply a site, MUST NOT hold more updates in memory with more sites, and MUST end when every site has
        answered or the latest deadline has passed; a generator may be closed before, where the round has enough. A site that cannot be
        reached yields a reply with a PF4xx or PF515 code.
        Immediately before a site's offer is handed to the network, it MUST ask `withheld`, and where that gives a code send nothing to the
        site and yield a reply with the code. Where it sends, it MUST call `sending` first: from then on the site may have charged its
        ledger.
        """
        ...


class Clock(Protocol):
    """UTC seconds."""

    def now(self) -> float:
        """The present."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait before a failed round is offered again."""
        ...


class RoundStore(Protocol):
    """The truth about runs and rounds.

    Every method is one transaction: it happens whole or not at all. Methods that take an `attempt` MUST refuse (RoundError, PF511) when a
    later attempt has taken the run up or when the run is not `machine.LIVE`, so that two loops can never both write. What happens to a
    run or a round goes through the tables of `machine`, and each transition is noted in the same transaction.
    """

    def begin_attempt(self, run: RunName, *, at: float) -> RunProgress:
        """Take up a run that is `machine.OPEN`: its attempt goes up by one, a planned one is running.

        Raises:
            RoundError: PF510, no such run; PF511, it is finished, failed, stopped or paused.
        """
        ...

    def progress(self, run: RunName) -> RunProgress:
        """Where the run stands.

        Raises:
            RoundError: PF510, no such run.
        """
        ...

    def candidates(self, run: RunName) -> list[Candidate]:
        """The sites listed in the run, in name order, each with its approval of the run's plan."""
        ...

    def commit_initial(self, run: RunName, attempt: int, checkpoint: Checkpoint, *, at: float) -> None:
        """Commit the initial state (round 0)."""
        ...

    def open_round(self, opening: RoundOpening) -> None:
        """Begin a round, or begin it again, and where `asks` is set offer it.

        It MUST follow the last committed round and start from its state.

        Raises:
            RoundError: PF511, also where the run is to pause or stop and this round is not under way.
        """
        ...

    def advance_round(self, run: RunName, attempt: int, round_index: int, event: RoundEvent, *, at: float) -> None:
        """Note what happens to the round as a whole: the first offer is sent, or enough updates are admitted.

        Raises:
            RoundError: PF560, the round's state takes no such event.
        """
        ...

    def note_participation(self, run: RunName, attempt: int, round_index: int, participation: Participation, *, at: float) -> None:
        """Note what became of one site, as it happens; the round is now collecting."""
        ...

    def note_quarantine(self, attempt: int, quarantined: Quarantined) -> None:
        """Note an update that was set aside. Noting the same one again changes nothing."""
        ...

    def released(self, run: RunName, round_index: int) -> list[Quarantined]:
        """The quarantined updates of a round that an operator lets count, in order of arrival."""
        ...

    def suspend_sites(self, run: RunName, attempt: int, *, after: int, at: float) -> list[SiteName]:
        """Suspend the run's sites whose updates were refused in their last `after` rounds for their own faults (`refusals`); 0: none.

        Which rounds count: those since the site was last reinstated in which its update was admitted or so refused.
        """
        ...

    def commit_round(self, result: RoundResult, statements: Mapping[SiteName, bytes]) -> None:
        """Commit a round: state, participations, statements of the admitted sites, checkpoint and audit event, all or nothing."""
        ...

    def fail_round(
        self, run: RunName, attempt: int, round_index: int, participations: Sequence[Participation], *, code: str, at: float
    ) -> int:
        """Note that the round did not count; the number of failed attempts at it, this one included."""
        ...

    def rest_run(self, run: RunName, attempt: int, *, at: float) -> RunState:
        """No round is under way: a pausing run is paused, a draining one stopped. Its state after this."""
        ...

    def finish_run(self, run: RunName, attempt: int, *, at: float) -> None:
        """The run is finished."""
        ...

    def fail_run(self, run: RunName, attempt: int, *, code: str, at: float) -> None:
        """The run is failed."""
        ...


class RunRecorder(Protocol):
    """Writes what a third party verifies later.

    The loop calls each method *before* it commits what the method records, so that a committed round is always recorded. A process killed
    in between does the round again: every method MUST therefore be idempotent, the later call for the same round replacing the earlier.
    """

    def begin(self, *, run: RunName, plan: Plan, candidates: Sequence[Candidate], initial_state: Path) -> None:
        """Open the record: the plan, the sites listed with their keys and approvals so far, and the initial state's file."""
        ...

    def record_round(
        self,
        *,
        result: RoundResult,
        statements: Mapping[SiteName, bytes],
        approvals: Mapping[SiteName, bytes],
        updates: Mapping[SiteName, Path],
        state: Path,
    ) -> None:
        """Record a round: its result, the admitted sites' statements, approvals and update files, and the next state's file."""
        ...

    def finish(self, *, run: RunName, rounds: int, state: Path, state_digest: Digest, optimiser: Path) -> None:
        """Close the record: the files of state and server optimiser after the last round."""
        ...
