"""Bulk files between site and server: base states down, with what the site has of them already, and sealed updates up.

Every cut is gone on from, over a new connection with the certificate of that moment, until the offer's deadline: at once as long as bytes
move, and after a pause that grows and is partly random when none do. Nothing here knows a patient: what is moved is public or released, of
a size that the plan gives, and how long it takes depends on the line alone.
"""

import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pathfed_client.egress.outlet import Outlet
from pathfed_client.home import SiteHome, hold
from pathfed_client.io.state_cache import StateCache
from pathfed_client.transport.bulk_client import BulkClient, Outbound, is_momentary, passes
from pathfed_common.errors import ErrorCode, HostError, PathfedError, TransportError
from pathfed_common.part_file import PartFile
from pathfed_common.protocol.messages import RoundOffer
from pathfed_common.shards import Manifest

_log = logging.getLogger(__name__)
_GB = 10**9
#: Pauses between connections that moved nothing, seconds.
_FIRST_S, _LONGEST_S = 0.5, 30.0
#: How often in a row what may be a moment's is tried.
_MOMENTS = 4
#: How long the site's keys may be another process's: a renewal asks the server and tries again.
_KEYS_S = 150.0
Result = TypeVar("Result")


class SiteBulk:
    """Implements `gate.ports.BulkPort` for one site. For one thread."""

    def __init__(
        self,
        home: SiteHome,
        outlet: Outlet,
        *,
        tunnel: int | None = None,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take an enrolled home, the door of what leaves, and the relay's loopback port to the control plane (None: no relay)."""
        self._home, self._outlet, self._tunnel = home, outlet, tunnel
        self._now, self._sleep = now, sleep

    def fetch(self, offer: RoundOffer) -> Path:
        """See `BulkPort`. Where the disk is full, earlier states make room."""
        cache = StateCache(self._home.base_states, int(self._home.policy_now().base_state_cache_gb * _GB))
        found = cache.find(offer.base_state, offer.base_state_bytes)
        if found is not None:
            cache.sweep(offer.base_state)
            return found
        try:
            return self._fetch(cache, offer)
        except HostError as error:
            if error.code is not ErrorCode.DISK_FULL or passes(error) or not cache.sweep(offer.base_state, 0):
                raise
            _log.warning("the disk is full: base states of earlier rounds were deleted")
            return self._fetch(cache, offer)

    def deliver(self, update: Path, manifest: Manifest, offer: RoundOffer) -> None:
        """See `BulkPort`."""
        going = Outbound(path=update, manifest=manifest, run=offer.run, round_index=offer.round_index)
        here = 0

        def send(client: BulkClient) -> None:
            nonlocal here
            here = client.begin(going)
            while here < manifest.size:
                here = client.send_shard(going, here)

        self._persist(send, lambda: here, offer.deadline)

    def _fetch(self, cache: StateCache, offer: RoundOffer) -> Path:
        manifest = self._persist(lambda client: client.manifest(offer.base_state), lambda: 0, offer.deadline)
        if manifest.size != offer.base_state_bytes:
            raise TransportError(ErrorCode.BASE_STATE_MISMATCH, "the server's file has another length than the offer says")
        with cache.part(manifest) as part:
            self._persist(lambda client: self._fill(cache, part, client, offer.deadline), lambda: part.here, offer.deadline)
            return cache.keep(part)

    def _fill(self, cache: StateCache, part: PartFile, client: BulkClient, deadline: float) -> None:
        """Fill a part up: shard by shard from what is here, or else from the server, which is given no time beyond the deadline."""
        while not part.is_whole:
            if self._now() >= deadline:
                raise TransportError(ErrorCode.TRANSFER_UNFINISHED, "the round's deadline came first")
            if not cache.copy_shard(part):
                client.fetch_shard(part)

    def _persist(self, work: Callable[[BulkClient], Result], place: Callable[[], int], deadline: float) -> Result:
        """Do work over a connection, again over another where it was cut, until the deadline. Each place at which it is cut is told once.

        Args:
            work: may be done again from where it stopped.
            place: grows while it gets on.
            deadline: UTC seconds.

        Raises:
            TransportError: PF465, the deadline; as `work`.
        """
        fruitless, farthest, told = 0, place(), -1
        while True:
            try:
                with self._connected() as client:
                    return work(client)
            except PathfedError as error:
                fruitless = 0 if place() > farthest else fruitless + 1
                farthest = max(farthest, place())
                if not passes(error) and (not is_momentary(error) or fruitless >= _MOMENTS):
                    raise
                pause = min(_LONGEST_S, _FIRST_S * 2 ** min(fruitless - 1, 10)) if fruitless else 0.0
                pause *= 0.5 + 0.5 * random.random()  # noqa: S311 - spreads sites, hides nothing
                if self._now() + pause >= deadline:
                    raise TransportError(
                        ErrorCode.TRANSFER_UNFINISHED, "the round's deadline came first", value=f"last: {error.code.value}"
                    ) from error
                if farthest != told:
                    _log.info("a transfer was cut (%s); it goes on from where it was", error.code.value)
                    told = farthest
            self._sleep(pause)

    def _connected(self) -> BulkClient:
        """A connection with key and certificate as they are now.

        Raises:
            TransportError: PF430, the home has no certificate.
            HostError: PF904, PF906: files, or another process holds the keys.
        """
        home = self._home
        if not home.enrolled:
            what = "the home has no certificate: base states and updates cannot be moved"
            raise TransportError(ErrorCode.NOT_ENROLLED, what, where=home.root, remedy="enrol it: `pathfed-site enroll`")
        with hold(home, "keys", patience_s=_KEYS_S):
            return BulkClient(
                home.server_card.control_address,
                ca=home.ca_file.read_bytes(),
                certificate=home.certificate_file.read_bytes(),
                key=home.keys.tls_key(),
                outlet=self._outlet,
                tunnel=self._tunnel,
            )
