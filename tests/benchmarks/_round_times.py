"""When things happened in one round. Both sides give these, from the same clock of the same machine."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RoundTimes:
    """One round. Times are UTC seconds.

    Attributes:
        offered: the server begins to send the round's messages.
        began: when each site began to train.
        ended: when each site had trained, in the same order.
        collected: the server holds every reply; pathfed has also checked and written each to disk by then.
        aggregated: the server holds the next state.
    """

    offered: float
    began: Sequence[float]
    ended: Sequence[float]
    collected: float
    aggregated: float

    @property
    def training_s(self) -> float:
        """Training of the slowest site."""
        return max(end - begin for begin, end in zip(self.began, self.ended, strict=True))

    @property
    def overhead_s(self) -> float:
        """The round beyond the slowest site's training."""
        return self.aggregated - self.offered - self.training_s

    def parts(self) -> dict[str, float]:
        """Where the overhead lies, seconds: until the last site trains, from its end to the last reply, and the server's arithmetic."""
        return {
            "to_last_site_training": max(self.began) - self.offered,
            "from_last_site_trained_to_replies": self.collected - max(self.ended),
            "aggregation": self.aggregated - self.collected,
        }


def periods(rounds: Sequence[RoundTimes]) -> list[float]:
    """Seconds from each round's start to the next one's, training taken off: what a long run pays a round, bookkeeping included."""
    return [after.offered - before.offered - before.training_s for before, after in itertools.pairwise(rounds)]


def wait_until(done: Callable[[], bool], within_s: float, what: str) -> None:
    """Wait.

    Raises:
        TimeoutError: it did not happen.
    """
    until = time.monotonic() + within_s
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {within_s:g} s")
        time.sleep(0.2)
