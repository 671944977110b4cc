"""A site that answers offers, on a clock that tests move."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from pathfed_client.answering import SiteAnswerer
from pathfed_client.gate.ports import Answer
from pathfed_client.home import SiteHome
from pathfed_client.io.site_store import SiteStore
from pathfed_common.provenance.statement import UpdateStatement

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


@dataclass
class Site:
    home: SiteHome
    store: SiteStore
    clock: Clock
    answer: SiteAnswerer

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
    clock = Clock()
    with (
        closing(SiteStore(home.database)) as store,
        closing(SiteAnswerer(home, store, now=clock.now, sleep=clock.sleep)) as answerer,
    ):
        yield Site(home, store, clock, answerer)


def bytes_of(answer: Answer) -> bytes:
    assert answer.code is None, answer.code
    assert answer.update is not None
    return answer.update.read_bytes()
