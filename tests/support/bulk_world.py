"""A run at a real server whose control plane listens, a site of the real client, a base state and an update; and lines that break."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from real_control import RealServer, Site

from pathfed_client.bulk import SiteBulk
from pathfed_client.egress.entry import EgressKind, Outgoing
from pathfed_client.egress.outlet import Outlet
from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.part_file import file_digest
from pathfed_common.plan import Plan
from pathfed_common.protocol.messages import RoundOffer
from pathfed_common.provenance.documents import Approval
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.units import UtcSeconds
from pathfed_server.db.rows import ApprovalRow
from pathfed_server.rounds import uploads
from pathfed_server.rounds.files import RunFiles
from pathfed_server.rounds.state import Checkpoint, Participation, ParticipationState, RoundOpening

#: Far from now: a test's transfers end because they are done.
LATER = 4_000_000_000.0


@dataclass
class Run:
    """A run of some sites with its initial state committed and its first round open."""

    server: RealServer
    name: RunName
    plan: Plan
    digest: Digest
    size: int
    state: bytes = field(default=b"", repr=False)

    @classmethod
    def begin(cls, server: RealServer, name: str, plan: Plan, sites: list[str], state: bytes | Path, *, most_bytes: int = 2**30) -> "Run":
        """A run whose initial state has these bytes, or is this file, which moves."""
        if isinstance(state, bytes):
            made = cls(server, RunName(name), plan, digest.of_bytes(state), len(state), state)
        else:
            made = cls(server, RunName(name), plan, file_digest(state), state.stat().st_size)
        names = [SiteName(site) for site in sites]
        for site in names:
            given = ApprovalRow(
                site=site,
                plan=plan.digest,
                declared_patients=8,
                reply_slots=True,
                envelope=Approval(site=site, plan=plan.digest, declared_patients=8, reply_slots=True, approved_at=UtcSeconds(1.0)).to_bytes(
                    SigningKey.generate()
                ),
                approved_at=1.0,
            )
            server.store.add_approval(given, at=1.0)
        server.store.create_run(made.name, plan_digest=plan.digest, sites=names, at=1.0)
        attempt = server.store.begin_attempt(made.name, at=1.0).attempt
        files = made.files
        files.prepare(0)
        if isinstance(state, bytes):
            files.state(0).write_bytes(state)
        else:
            state.rename(files.state(0))
        first = Checkpoint(
            round_index=0,
            state=made.digest,
            state_path=files.relative(files.state(0)),
            state_bytes=made.size,
            optimiser=digest.of_bytes(b"optimiser of " + name.encode()),
            optimiser_path="none",
            optimiser_bytes=1,
        )
        server.store.commit_initial(made.name, attempt, first, at=1.0)
        made.open(attempt, names, most_bytes)
        return made

    def open(self, attempt: int, sites: list[SiteName], most_bytes: int) -> None:
        rows = tuple(Participation(site=site, state=ParticipationState.OFFERED, offered_at=1.0) for site in sorted(sites))
        opening = RoundOpening(
            run=self.name, attempt=attempt, round_index=1, base_state=self.digest, participations=rows, offered_at=1.0, deadline=LATER
        )
        self.server.store.open_round(opening)
        self.files.prepare(1)
        uploads.allow(self.incoming, most_bytes)

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.server.home.root, self.name)

    @property
    def incoming(self) -> Path:
        return self.files.incoming(1)

    def offer(self, site: str, deadline: float = LATER, **changes: object) -> RoundOffer:
        values = {
            "run": self.name,
            "site": SiteName(site),
            "round_index": 1,
            "plan": self.plan.digest,
            "base_state": self.digest,
            "base_state_bytes": self.size,
            "offered_at": 1.0,
            "deadline": deadline,
        }
        return RoundOffer(**{**values, **changes})  # type: ignore[arg-type]

    def decided(self, site: str) -> None:
        """The outcome for a site is no longer open."""
        row = Participation(site=SiteName(site), state=ParticipationState.SILENT, code="PF515", offered_at=1.0)
        self.server.store.note_participation(self.name, 1, 1, row, at=1.0)


def bulk_of(site: Site, **options: object) -> SiteBulk:
    """The site's bulk plane, on a clock that stands and without pauses."""
    return SiteBulk(site.home, Outlet(site.record), **{"now": lambda: 2.0, "sleep": lambda seconds: None, **options})  # type: ignore[arg-type]


def sent(site: Site, *kinds: EgressKind) -> list[Outgoing]:
    """What the site wrote down of some kinds."""
    return [entry.sent for entry in site.record.entries() if entry.sent.kind in kinds]


@dataclass
class Line:
    """A line to the control port that a test breaks: each connection is reset once so many bytes have gone through it, either way.

    Attributes:
        port: on the loopback.
        cuts: bytes after which the next connections are reset; when none is left, they last.
        carried: bytes that went through, up and down.
        opened: how many connections there were.
    """

    port: int
    cuts: list[int]
    carried: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    opened: int = 0


@contextmanager
def breaking_line(address: str, cuts: list[int]) -> Iterator[Line]:
    """Serve a `Line` to an address."""
    host, _, port = address.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    line = Line(listener.getsockname()[1], cuts)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                line.opened += 1
                left = [line.cuts.pop(0) if line.cuts else 2**62]
                try:
                    there = socket.create_connection((host, int(port)))
                except OSError:
                    client.close()
                    continue
                for way, source, target in (("up", client, there), ("down", there, client)):
                    threading.Thread(target=_pump, args=(line, way, source, target, left), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield line
    finally:
        listener.close()


def _pump(line: Line, way: str, source: socket.socket, target: socket.socket, left: list[int]) -> None:
    with suppress(OSError):
        while data := source.recv(16384):
            line.carried[way] += len(data)
            left[0] -= len(data)
            if left[0] < 0:
                break
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


def random_file(path: Path, size: int) -> Path:
    """A file that does not compress."""
    path.write_bytes(os.urandom(size))
    return path
