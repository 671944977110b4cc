"""How much one caller may ask, a token bucket each, and how many long calls at once; in memory."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pathfed_common.errors import ErrorCode, TransportError

#: Callers remembered; the one heard of longest ago is forgotten first, and starts with a full bucket when it comes again.
_MOST_CALLERS = 10_000


class RateLimit:
    """At most `burst` calls, or bytes, at once, and `per_second` in the long run, for each caller. Safe for several threads."""

    def __init__(self, *, per_second: float, burst: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Begin with nobody known.

        Raises:
            ValueError: a rate or burst that lets nobody call.
        """
        if per_second <= 0 or burst < 1:
            raise ValueError(f"per_second must be above 0 and burst at least 1, got {per_second} and {burst}")
        self._per_second, self._burst, self._monotonic = per_second, burst, monotonic
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, caller: str, cost: int = 1) -> bool:
        """Whether the caller may have so much; counts it if so."""
        now = self._monotonic()
        with self._lock:
            left, since = self._buckets.pop(caller, (float(self._burst), now))
            left = min(float(self._burst), left + (now - since) * self._per_second)
            allowed = left >= cost
            self._buckets[caller] = (left - cost if allowed else left, now)
            if len(self._buckets) > _MOST_CALLERS:
                self._buckets.popitem(last=False)
        return allowed


class Places:
    """How many long calls are in hand at once, in all and of one caller. Safe for several threads."""

    def __init__(self, *, most: int, of_one: int) -> None:
        """Begin with none in hand."""
        self._most, self._of_one = most, of_one
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, caller: str) -> Iterator[None]:
        """Hold a place for as long as the context lasts.

        Raises:
            TransportError: PF417, none is free: ask again later.
        """
        with self._lock:
            if self._taken.total() >= self._most or self._taken[caller] >= self._of_one:
                raise TransportError(ErrorCode.RATE_LIMITED, "too many transfers at once", value=caller)
            self._taken[caller] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[caller] -= 1
                if not self._taken[caller]:
                    del self._taken[caller]
