"""The notifier's process: a thread a receiver, none of which holds up another. `pathfed-server start` starts and watches it.

Run as `python -m pathfed_server.notifying.notifier --home HOME`. No round waits for it, and it may be killed at any time. It takes up
changes of `notify.toml` by itself; while that file cannot be used, it goes on with what it had.
"""

import argparse
import functools
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from pathfed_common import console, process_lock
from pathfed_common.errors import ErrorCode, PathfedError, RoundError
from pathfed_common.processes import ProcessSpec
from pathfed_server.db.event_feed import EventFeed
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.notifying.delivering import deliver
from pathfed_server.notifying.kinds import KINDS
from pathfed_server.notifying.sender import AT_EASE, Pace, Sender
from pathfed_server.notifying.settings import Receivers, receivers, settings_file

_LOG = logging.getLogger(__name__)
_ALWAYS_AGAIN = 10**9
_RESTART_DELAY_S = 5.0
_LOOK_S = 1.0
_AWAY_S = 5.0
_LEAVE_S = 3.0

_Version = tuple[int, int] | None


def notifier_processes(home: ServerHome) -> list[ProcessSpec]:
    """The process as its owner runs it; none where nobody is to be told. It may end as often as it likes.

    Raises:
        HostError: PF904, PF905, PF906: `notify.toml`, or a file that it names, cannot be used.
    """
    if not settings_file(home).exists():
        return []
    receivers(home)
    argv = [sys.executable, "-m", "pathfed_server.notifying.notifier", "--home", str(home.root.resolve())]
    return [
        ProcessSpec(
            name="notifier",
            argv=argv,
            log=home.logs / "notifier.log",
            environment={"PYTHONUNBUFFERED": "1"},
            restarts=_ALWAYS_AGAIN,
            restart_delay_s=_RESTART_DELAY_S,
        )
    ]


class Notifier:
    """Keeps a thread for each receiver of the settings as they are now.

    Args:
        home: the server's home.
        store: the open store.
        ended: set when it is to end.
        pace: the senders' times.
    """

    def __init__(self, home: ServerHome, store: SqlStore, ended: threading.Event, pace: Pace = AT_EASE) -> None:
        self._home, self._store, self._ended, self._pace = home, store, ended, pace

    def run(self) -> None:
        """Tell until it is to end.

        Raises:
            RuntimeError: a thread ended by itself, which is a bug of ours; its trace is in the log.
        """
        seen, given = self._first()
        while not self._ended.is_set():
            if not self._begin(given):
                return
            changed = threading.Event()
            threads = [threading.Thread(target=sender.run, daemon=True) for sender in self._senders(given, changed)]
            for thread in threads:
                thread.start()
            try:
                seen, given = self._until_changed(threads, seen, given)
            finally:
                changed.set()
                _join(threads)

    def _first(self) -> tuple[_Version, Receivers]:
        """The settings, as soon as they can be used."""
        seen = _version(self._home)
        try:
            return seen, receivers(self._home)
        except PathfedError as error:
            _LOG.error("%s; waiting for other settings", error)
        return self._until_changed([], seen, Receivers({}, 0.0))

    def _begin(self, given: Receivers) -> bool:
        """Keep the receivers of the settings; whether it is to go on."""
        while not self._ended.is_set():
            try:
                self._store.keep_receivers(given.each, after=EventFeed.from_now(self._store).after)
            except RoundError as error:
                if error.code is not ErrorCode.DATABASE_UNAVAILABLE:
                    raise
                self._ended.wait(_AWAY_S)
            else:
                return True
        return False

    def _senders(self, given: Receivers, changed: threading.Event) -> list[Sender]:
        return [
            Sender(
                name=name,
                consortium=self._home.settings.consortium,
                kinds=frozenset(receiver.settings.events or KINDS),
                every_s=receiver.settings.every_s,
                give_up_s=given.give_up_s,
                deliver=functools.partial(deliver, receiver),
                places=self._store,
                ended=changed,
                pace=self._pace,
            )
            for name, receiver in given.each.items()
        ]

    def _until_changed(self, threads: list[threading.Thread], seen: _Version, given: Receivers) -> tuple[_Version, Receivers]:
        """Wait until the settings are others and can be used, or it is to end."""
        while not self._ended.wait(_LOOK_S):
            if not all(thread.is_alive() for thread in threads):
                raise RuntimeError("a sender ended by itself")
            now = _version(self._home)
            if now == seen:
                continue
            seen = now
            try:
                found = receivers(self._home)
            except PathfedError as error:
                _LOG.error("%s; going on with the settings before it", error)
                continue
            _LOG.info("%s has changed; receivers: %s", settings_file(self._home).name, ", ".join(found.each) or "none")
            return seen, found
        return seen, given


def _version(home: ServerHome) -> _Version:
    """What tells a changed file from the one before; None: there is none."""
    try:
        found = settings_file(home).stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino


def _join(threads: Iterable[threading.Thread]) -> None:
    """Wait for senders, but not for one that waits for an answer for long: its message is sent again."""
    until = time.monotonic() + _LEAVE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _alone(home: ServerHome, ended: threading.Event) -> bool:
    """Wait until no other notifier of this home lives: one whose server was killed may still be ending. The lock lasts with the process."""
    while not ended.is_set():
        if (held := process_lock.take(home.root / "notifier.lock")) is not None:
            _HELD.append(held)
            return True
        ended.wait(_LOOK_S)
    return False


#: What must stay open for as long as the process lives.
_HELD: list[object] = []


def main() -> None:
    """Tell until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", required=True, type=Path)
    home = ServerHome(parser.parse_args().home)
    console.log_to_stderr()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        if _alone(home, ended):
            with SqlStore(home.database_url) as store:
                Notifier(home, store, ended).run()
    except PathfedError as error:
        console.show_error(error)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
