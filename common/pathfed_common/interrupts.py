"""Being asked to end: Ctrl-C and SIGTERM take the same orderly way out, and are not lost.

Python turns a signal into a KeyboardInterrupt at whatever line runs then. That line may be in a library that swallows it, a bare `except`
around an import say, and the program goes on as if nobody had asked. So it is noted as well, and the loops of long-running commands ask.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Signals that came; a list, for a handler may interrupt itself and must wait for no lock.
_asked: list[int] = []


def end_on_terminate() -> None:
    """Turn SIGTERM and SIGINT into KeyboardInterrupt, and note them for `heed`.

    Also heeds SIGINT where a shell started the command in the background, which would leave it ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        _asked.append(number)
        raise KeyboardInterrupt

    _asked.clear()
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)


def heed() -> None:
    """Ask in every turn of a long loop, and never on the way out.

    Raises:
        KeyboardInterrupt: this process was asked to end, and whatever ran then swallowed it.
    """
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """Let the handlers of SIGINT and SIGTERM wait until the block ends."""
    if threading.current_thread() is not threading.main_thread():  # where no handler ever runs
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    noted: list[tuple[int, FrameType | None]] = []
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, frame: noted.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        for came, frame in noted[:1]:
            first = handlers[signal.Signals(came)]
            if callable(first):
                first(came, frame)
