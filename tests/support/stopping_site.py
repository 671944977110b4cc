"""A site's runner as a process of its own that comes to a moment of a round and stays there, for tests that stop it then.

Run as `python stopping_site.py HOME OFFER BASE_STATE MOMENT`. It prints `at MOMENT` when it is there, and `answered` should it ever get on.
"""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from answering_site import Clock, LocalBulk

from pathfed_client.answering import SiteAnswerer
from pathfed_client.budget.ledger import Ledger
from pathfed_client.home import SiteHome, hold
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.tile_stream import TileStream

#: moment -> class, method, whether it is reached before or after the method
MOMENTS: dict[str, tuple[type, str, str]] = {
    "before the charge": (Ledger, "charge", "before"),
    "while tiles are read": (TileStream, "read", "after"),
    "before the seal": (SiteStore, "put_sealed", "before"),
}
#: Waiting for the public time slot, in which the answerer sleeps.
WAITING = "before the answer leaves"


def stay(moment: str) -> None:
    """Say that the moment has come, and wait to be ended."""
    print(f"at {moment}", flush=True)
    time.sleep(600)


def stay_in(moment: str) -> None:
    """Let the round come to the moment and no further."""
    kind, name, when = MOMENTS[moment]
    method: Callable[..., Any] = getattr(kind, name)

    def stopping(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            stay(moment)
        result = method(*arguments, **named)
        stay(moment)
        return result

    setattr(kind, name, stopping)


def main(home: SiteHome, offer: bytes, base_state: bytes, moment: str) -> None:
    """Answer the offer as the runner does, under its lock."""
    clock, bulk = Clock(), LocalBulk(home)
    bulk.holds = base_state
    if moment in MOMENTS:
        stay_in(moment)
    sleep = clock.sleep if moment != WAITING else lambda seconds: stay(moment)
    with (
        hold(home, "runner"),
        closing(SiteStore(home.database)) as store,
        closing(SiteAnswerer(home, store, lambda outlet: bulk, now=clock.now, sleep=sleep)) as answer,
    ):
        print("answered", answer(offer).code, flush=True)


if __name__ == "__main__":
    main(SiteHome(Path(sys.argv[1])), Path(sys.argv[2]).read_bytes(), Path(sys.argv[3]).read_bytes(), sys.argv[4])
