"""A site that answers offers, on a clock that tests move."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pathfed_client.answering import SiteAnswerer
from pathfed_client.gate.ports import Answer
from pathfed_client.home import SiteHome
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.protocol.messages import RoundOffer
from pathfed_common.provenance.statement import UpdateStatement
from pathfed_common.shards import Manifest

OFFERED_AT = 1_000_000.0


@dataclass
class Clock:
    """A clock that sleeping moves."""

    time: float = OFFERED_AT + 1.5
    slept: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


class LocalBulk:
    """A bulk plane of this process: the server holds one base state, and what was delivered is noted."""

    def __init__(self, home: SiteHome) -> None:
        self._home = home
        self.holds = b""
        self.fetched = 0
        #: Digest of an update -> the sealed file that was delivered.
        self.delivered: dict[str, Path] = {}
        self.before_delivery: Callable[[], None] = lambda: None

    def fetch(self, offer: RoundOffer) -> Path:
        self.fetched += 1
        if (digest.of_bytes(self.holds), len(self.holds)) != (offer.base_state, offer.base_state_bytes):
            raise TransportError(ErrorCode.BASE_STATE_MISMATCH, "other bytes")
        path = self._home.root / "fetched.safetensors"
        path.write_bytes(self.holds)
        return path

    def deliver(self, update: Path, manifest: Manifest, offer: RoundOffer) -> None:
        del offer
        self.before_delivery()
        assert digest.of_bytes(update.read_bytes()) == manifest.file
        self.delivered[manifest.file] = update
        _DELIVERED[manifest.file] = update


_DELIVERED: dict[str, Path] = {}


class Answering:
    """An answerer, asked with the base state that lies at the server."""

    def __init__(self, answerer: SiteAnswerer, bulk: LocalBulk) -> None:
        self.answerer, self.bulk = answerer, bulk
        self.refused = answerer.refused

    def __call__(self, envelope: bytes, base_state: bytes) -> Answer:
        self.bulk.holds = base_state
        return self.answerer(envelope)


@dataclass
class Site:
    home: SiteHome
    store: SiteStore
    clock: Clock
    answer: Answering

    def charges(self) -> int:
        return len(self.store.entries())

    def released(self) -> list[str]:
        return sorted(path.name for path in self.home.updates.iterdir())

    def statement(self, answer: Answer) -> UpdateStatement:
        assert answer.code is None, answer.code
        assert answer.statement is not None
        return UpdateStatement.from_envelope(answer.statement, self.home.evidence_key.public)


@contextmanager
def opened(home: SiteHome) -> Iterator[Site]:
    clock, bulk = Clock(), LocalBulk(home)
    with (
        closing(SiteStore(home.database)) as store,
        closing(SiteAnswerer(home, store, lambda outlet: bulk, now=clock.now, sleep=clock.sleep)) as answerer,
    ):
        yield Site(home, store, clock, Answering(answerer, bulk))


def file_of(answer: Answer) -> Path:
    """The sealed file of the update that an answer's statement names, which was delivered."""
    assert answer.code is None, answer.code
    assert answer.statement is not None
    statement = json.loads(base64.b64decode(json.loads(answer.statement)["payload"]))
    return _DELIVERED["sha256:" + statement["subject"][0]["digest"]["sha256"]]


def bytes_of(answer: Answer) -> bytes:
    return file_of(answer).read_bytes()
