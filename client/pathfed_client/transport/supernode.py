"""Our launcher of Flower's SuperNode: the one place that touches its private loop.

Six things are changed, and nothing else:

    - A SuperNode whose connection loop has died can go on serving its health and runtime ports (a zombie). The launcher ends the whole
      process when the loop returns or raises, so that the supervisor sees it and starts it again.
    - So can one whose heartbeat has died, of an answer that Flower does not expect (a server in trouble: HTTP 500): it goes on asking for
      messages, but the server counts it as gone and sends it none. An exception that ends any thread ends the process. So does a loop that
      has not come round for `STUCK_S`: it waits for something that does not come, such as a server that has been away for as long.
    - A SuperNode with nothing to do asks SuperLink for a message, and sleeps three seconds, hard-coded. A round waits for the slowest of
      its sites, so with three sites it stood still for 2.25 s on average before the last one had even seen the offer. The launcher shortens
      that one sleep to `IDLE_POLL_S`; the loop's other sleeps, which wait for the site's own runner, stay as they are.
    - The loop takes a message, waits for a reply, sends it, and only then takes the next: it looks for no reply but after a message. A
      server's round loop that dies while a message is being taken leaves one whose reply comes uncounted: it is sent in the place of the
      next one's, and so for ever, each reply a message too late. The launcher lets the loop send whenever a reply is there.
    - Heartbeats come twice as often (`heartbeat.py`).
    - After an answer that was cut on its way, and may have taken an offer with it, a new session is begun (`session.py`).

flwr is pinned exactly, and tests/client/transport/test_supernode.py fails when the loop changes.

It holds a lock while it lives (`LOCK_VARIABLE`), so that the site's stop switch finds it.

Run as `python -m pathfed_client.transport.supernode <flower-supernode's arguments>`.
"""

import importlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from flwr.supernode.cli import flower_supernode

from pathfed_client.transport.heartbeat import beat_often
from pathfed_client.transport.session import renew_after_cut
from pathfed_client.transport.site_engine import LOCK_VARIABLE
from pathfed_common import process_lock

ENDED = 70
_LOOK_AGAIN_S = 0.2
#: Seconds between two questions of an idle SuperNode. One costs the server about 15 ms of a core and the site under 1 ms: a server
#: of sixty idle sites is kept busy by them, one of twenty is not.
IDLE_POLL_S = 1.0
_FLOWERS_IDLE_S = 3
#: Seconds in which the loop comes round at least once, however long a round takes: while the site works it looks twice a second.
STUCK_S = 900.0
#: What the loop is told in place of a message's run, which it compares with None alone.
_ANY_RUN = 0
_LOOP = "flwr.supernode.start_client_internal"


class _Time:
    """The module `time` as the SuperNode's loop sees it: the idle sleep is shorter, and that the loop came round is noted.

    Attributes:
        came_round: when the loop slept last, monotonic seconds.
    """

    def __init__(self) -> None:
        self.came_round = time.monotonic()

    def sleep(self, seconds: float) -> None:
        self.came_round = time.monotonic()
        time.sleep(IDLE_POLL_S if seconds == _FLOWERS_IDLE_S else seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def shorten_idle_sleep() -> _Time:
    """Make the SuperNode's loop in this process ask for messages every `IDLE_POLL_S`; the clock that it sleeps by.

    Raises:
        RuntimeError: the loop no longer uses the module `time`; look at it again before raising flwr's pin.
    """
    loop = importlib.import_module(_LOOP)
    if getattr(loop, "time", None) is not time:
        raise RuntimeError(f"{_LOOP} no longer sleeps by `time.sleep`: look again before raising the pin")
    loop.time = clock = _Time()  # type: ignore[attr-defined]
    return clock


def send_every_reply() -> None:
    """Make the SuperNode's loop in this process send replies that are there though no message has come.

    Raises:
        RuntimeError: the loop takes messages in another way; look at it again before raising flwr's pin.
    """
    loop: Any = importlib.import_module(_LOOP)
    take = getattr(loop, "_pull_and_store_message", None)
    if take is None:
        raise RuntimeError(f"{_LOOP} no longer takes messages by `_pull_and_store_message`: look again before raising the pin")

    def take_or_send(*, state: Any, **given: Any) -> int | None:
        run: int | None = take(state=state, **given)
        return _ANY_RUN if run is None and _reply_waits(state) else run

    loop._pull_and_store_message = take_or_send


def _reply_waits(state: Any) -> bool:
    """Whether a reply is there that was not sent; asked without taking it, which Flower's own question does."""
    with state.lock_msg_store:
        return any(entry.message.metadata.reply_to_message_id and not entry.is_retrieved for entry in state.msg_store.values())


def end_when_stuck(clock: _Time, within_s: float = STUCK_S) -> None:
    """Let the process end when the loop has not come round for so long."""

    def watch() -> None:
        while time.monotonic() - clock.came_round < within_s:
            time.sleep(min(_LOOK_AGAIN_S * 10, within_s))
        print(f"the loop has not come round for {within_s:g} s; the SuperNode ends, to be started again", file=sys.stderr)  # noqa: T201
        sys.stderr.flush()
        os._exit(ENDED)

    threading.Thread(target=watch, name="end-when-stuck", daemon=True).start()


def end_with_any_thread() -> None:
    """Let the process end, with its reason in the log, when an exception ends one of its threads."""

    def end(died: threading.ExceptHookArgs) -> None:
        named = "a thread" if died.thread is None else died.thread.name
        print(f"{named} has died; the SuperNode ends, to be started again", file=sys.stderr)  # noqa: T201 - the log of this process
        threading.__excepthook__(died)
        sys.stderr.flush()
        os._exit(ENDED)

    threading.excepthook = end


def hold_lock() -> BinaryIO | None:
    """Hold the lock that the environment names, once an earlier SuperNode of this site has let go of it; None: it names none."""
    named = os.environ.get(LOCK_VARIABLE)
    if named is None:
        return None
    while (held := process_lock.take(Path(named))) is None:
        time.sleep(_LOOK_AGAIN_S)
    return held


def main() -> None:
    """Run the SuperNode; end the process with it."""
    lock = hold_lock()  # until the process ends
    end_with_any_thread()
    beat_often()
    renew_after_cut()
    send_every_reply()
    end_when_stuck(shorten_idle_sleep())
    try:
        flower_supernode()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        del lock
        os._exit(ENDED)


if __name__ == "__main__":
    main()
