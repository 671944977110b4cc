"""A process beside this one that works off tasks one by one, so that what crashes or hangs a decoder costs a task and not the program.

Tasks and answers go as Python values over a socket that only the two processes have. Guarantees:

- a process that ends, or is late, is noticed as `Ended` with the reason; the caller knows which task it had;
- no process outlives its parent, be that killed with -9: the kernel ends it with the thread that started it;
- where memory runs out, the kernel ends a side process before its parent;
- what a decoder prints, which may name files, goes nowhere.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pathfed_common.errors import ErrorCode, HostError

#: Seconds a process may take until it is ready.
START_TIMEOUT_S = 120.0
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PR_SET_PDEATHSIG = 1


class EndedError(Exception):
    """A side process ended. `late`: it was ended, because its time was over."""

    def __init__(self, how: str, *, late: bool) -> None:
        super().__init__(f"the reading process {how}")
        self.late = late


class SideProcess:
    """One process, started at once. `connection` can be waited for with `multiprocessing.connection.wait`."""

    def __init__(self, command: Sequence[str], arguments: Sequence[str] = (), *, timeout_s: float, pass_fds: Sequence[int] = ()) -> None:
        """Start it.

        Args:
            command: what it runs, such as `code_digest.module_command` gives; it calls `serve` with the argument that follows.
            arguments: further arguments.
            timeout_s: seconds a task may take.
            pass_fds: file descriptors it inherits.
        """
        self._timeout_s = timeout_s
        self._ready = False
        self._deadline = time.monotonic() + START_TIMEOUT_S
        ours, theirs = socket.socketpair()
        with theirs:
            end = theirs.fileno()
            self._process = subprocess.Popen(
                [*command, str(end), *arguments],
                pass_fds=[end, *pass_fds],
                env={**os.environ, **dict.fromkeys(_THREADS, "1")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.connection: Connection[Any, Any] = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def deadline(self) -> float:
        """When it is late, on `time.monotonic`."""
        return self._deadline

    def more_time(self) -> None:
        """Count the time for a task from now on; before the process is ready its start counts."""
        if self._ready:
            self._deadline = time.monotonic() + self._timeout_s

    def send(self, task: object) -> None:
        """Hand over a task. One that has ended is noticed by `receive`."""
        with contextlib.suppress(OSError):
            self.connection.send(task)

    def receive(self) -> Any:
        """The next answer; None when the process only says that it is ready.

        Raises:
            EndedError: it has ended.
            HostError: PF903, it ended before it was ready: no task is to blame.
        """
        try:
            told = self.connection.recv()
        except (EOFError, OSError):
            self.end()
            raise self._ended(f"ended with status {self._process.returncode}", late=False) from None
        if told is None:
            self._ready = True
            self.more_time()
        return told

    def check_time(self) -> None:
        """End the process if it is late.

        Raises:
            EndedError: it was.
            HostError: PF903, it was not even ready: no task is to blame.
        """
        if time.monotonic() >= self._deadline:
            self.end()
            raise self._ended(f"took longer than {self._timeout_s if self._ready else START_TIMEOUT_S:g} s", late=True)

    def _ended(self, how: str, *, late: bool) -> EndedError | HostError:
        if self._ready:
            return EndedError(how, late=late)
        return HostError(ErrorCode.PROCESS_ENDED, "a reading process does not start", value=how)

    def end(self) -> None:
        """End the process now. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        self.connection.close()


def serve(end: int, work: Callable[[Any], Any]) -> None:
    """The process's side: answer tasks until the connection closes.

    Args:
        end: number of its end of the connection.
        work: from a task to its answer; never None.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its processes itself
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    connection: Connection[Any, Any] = Connection(end)
    connection.send(None)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(work(task))
