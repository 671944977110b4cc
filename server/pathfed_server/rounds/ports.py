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
from pathfed_server.rounds.state import Candidate, Checkpoint, Participation, Quarantined, RoundOpening, RoundResult, RunProgress


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One site's round offer, ready to send.

    Attributes:
        site: the receiver.
        envelope: the signed `RoundOffer` (DSSE bytes).
        base_state: file whose bytes travel with it.
        deadline: UTC seconds after which a reply does not count.
    """

    site: SiteName
    envelope: bytes
    base_state: Path
    deadline: float


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back from one site: an update with its statement, or a code.

    Attributes:
        site: the sender, as the transport authenticated it.
        code: the site's refusal or failure code, or None when it sent an update.
        statement: the signed statement (DSSE bytes), or None.
        update: the spooled update's file, or None.
        received_at: UTC seconds when the last byte was spooled.
        transfer_s: seconds from the first sight of the reply to its last byte on disk.
    """

    site: SiteName
    code: str | None
    statement: bytes | None
    update: Path | None
    received_at: float
    transfer_s: float


#: Why nothing may be sent to a site now, as a code, or None: asked of the store at the moment of sending.
Consent = Callable[[SiteName], str | None]


class SitePort(Protocol):
    """Sends offers and brings replies back, one at a time."""

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent) -> Iterator[Reply]:
        """Send the offers, then yield each reply as it arrives, its update already in a file under `spool`.

        MUST yield at most one reply a site, MUST NOT hold more updates in memory with more sites, and MUST end when every site has
        answered or the latest deadline has passed. A site that cannot be reached yields a reply with a PF4xx or PF515 code.
        Immediately before a site's offer is handed to the network, it MUST ask `withheld`, and where that gives a code send nothing to the
        site and yield a reply with the code.
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
    later attempt has taken the run up or when the run is not running, so that two loops can never both write.
    """

    def begin_attempt(self, run: RunName, *, at: float) -> RunProgress:
        """Take a planned or running run up: its attempt goes up by one, its state is running.

        Raises:
            RoundError: PF510, no such run; PF511, it is finished, failed or stopped.
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
        """Note that a round is being offered, and until when. It MUST follow the last committed round and start from its state."""
        ...

    def note_participation(self, run: RunName, attempt: int, round_index: int, participation: Participation) -> None:
        """Note what became of one site, as it happens; the round is now collecting."""
        ...

    def note_quarantine(self, attempt: int, quarantined: Quarantined) -> None:
        """Note an update that was set aside. Noting the same one again changes nothing."""
        ...

    def commit_round(self, result: RoundResult, statements: Mapping[SiteName, bytes]) -> None:
        """Commit a round: state, participations, statements of the admitted sites, checkpoint and audit event, all or nothing."""
        ...

    def fail_round(
        self, run: RunName, attempt: int, round_index: int, participations: Sequence[Participation], *, code: str, at: float
    ) -> int:
        """Note that the round did not count; the number of failed attempts at it, this one included."""
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
