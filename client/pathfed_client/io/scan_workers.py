"""Reading slides in processes of this machine, so that a slide that crashes or hangs its decoder costs that slide and nothing else.

Each process reads one slide at a time, so it is always known whose fault an ending was. Guarantees:

- a process that ends, whatever ended it, gives its slide the code PF220 and is replaced;
- a slide that takes longer than the limit is given up with PF221, its process killed and replaced;
- no process outlives the scan, be it killed with -9 (the kernel ends them with their parent);
- where memory runs out, the kernel ends a reading process before the scan;
- a decoder's own messages, which may name files, go nowhere.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pathfed_client.io.scan_reading import SlideReading, SlideTask, read_slide
from pathfed_common.errors import ErrorCode, HostError

#: Seconds a slide may take.
SLIDE_TIMEOUT_S = 300.0
#: Seconds a reading process may take until it is ready.
START_TIMEOUT_S = 120.0

COMMAND = (sys.executable, "-P", "-m", "pathfed_client.io.scan_workers")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PR_SET_PDEATHSIG = 1


def usable_cpus() -> int:
    """The CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


class SlideProcess:
    """One reading process. Started at once; gives one reading for one task."""

    def __init__(self, timeout_s: float, command: Sequence[str] = COMMAND) -> None:
        """Start it.

        Args:
            timeout_s: seconds a slide may take.
            command: what to run; the number of its end of the connection is appended.
        """
        self.task: SlideTask | None = None
        self._timeout_s = timeout_s
        self._ready = False
        self.deadline = time.monotonic() + START_TIMEOUT_S
        ours, theirs = socket.socketpair()
        with theirs:
            end = theirs.fileno()
            self._process = subprocess.Popen(
                [*command, str(end)],
                pass_fds=[end],
                env={**os.environ, **dict.fromkeys(_THREADS, "1")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.connection: Connection[Any, Any] = Connection(ours.detach())

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def begin(self, task: SlideTask) -> None:
        """Hand over a task."""
        self.task = task
        if self._ready:
            self.deadline = time.monotonic() + self._timeout_s
        with contextlib.suppress(OSError):  # it has ended; `take` says so
            self.connection.send(task)

    def take(self) -> SlideReading | None:
        """What came through the connection: a reading, or None when the process only said that it is ready.

        Raises:
            HostError: PF903, it ended before it was ready: that is no slide's fault.
        """
        try:
            told: SlideReading | None = self.connection.recv()
        except (EOFError, OSError):
            return self._ended()
        if told is None:
            self._ready = True
            self.deadline = time.monotonic() + self._timeout_s
        else:
            self.task = None
        return told

    def give_up(self) -> SlideReading:
        """End the process because its time is over."""
        self.kill()
        if not self._ready or self.task is None:
            raise HostError(ErrorCode.PROCESS_ENDED, f"a reading process was not ready within {START_TIMEOUT_S:g} s")
        detail = f"reading took longer than {self._timeout_s:g} s"
        return SlideReading(number=self.task.number, code=ErrorCode.SLIDE_TIMEOUT, detail=detail)

    def _ended(self) -> SlideReading:
        self.kill()
        if not self._ready or self.task is None:
            raise HostError(ErrorCode.PROCESS_ENDED, "a reading process does not start", value=f"status {self._process.returncode}")
        detail = f"the reading process ended with status {self._process.returncode}"
        return SlideReading(number=self.task.number, code=ErrorCode.SLIDE_CRASHED, detail=detail)

    def kill(self) -> None:
        """End the process now. Safe to call twice."""
        self._process.kill()
        self._process.wait()
        self.connection.close()


class ProcessExecutor:
    """Reads slides in a fixed number of processes; implements `SlideExecutor`. A context manager."""

    def __init__(self, workers: int, *, timeout_s: float = SLIDE_TIMEOUT_S, command: Sequence[str] = COMMAND) -> None:
        """Make the executor; processes start with the first slides.

        Args:
            workers: reading processes, at least 1.
            timeout_s: seconds a slide may take.
            command: what a reading process runs.
        """
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.slots = workers
        self._timeout_s = timeout_s
        self._command = command
        self._idle: list[SlideProcess] = []
        self._busy: dict[Connection[Any, Any], SlideProcess] = {}

    def __enter__(self) -> "ProcessExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: SlideTask, /) -> None:
        """See `SlideExecutor`."""
        process = next((one for one in self._take_idle() if one.alive), None) or SlideProcess(self._timeout_s, self._command)
        self._busy[process.connection] = process
        process.begin(task)

    def _take_idle(self) -> Iterator[SlideProcess]:
        while self._idle:
            yield self._idle.pop()

    def finished(self) -> Sequence[SlideReading]:
        """See `SlideExecutor`."""
        done: list[SlideReading] = []
        while not done:
            nearest = min(process.deadline for process in self._busy.values())
            told = wait(list(self._busy), timeout=max(0.0, nearest - time.monotonic()))
            done = [reading for end in told if (reading := self._take(end)) is not None]
            late = [process for process in self._busy.values() if process.deadline <= time.monotonic()]
            for process in late:
                del self._busy[process.connection]
                done.append(process.give_up())
        return done

    def _take(self, end: Any) -> SlideReading | None:
        process = self._busy[end]
        reading = process.take()
        if reading is not None:
            del self._busy[end]
            if process.task is None:
                self._idle.append(process)
        return reading

    def close(self) -> None:
        """See `SlideExecutor`."""
        for process in (*self._idle, *self._busy.values()):
            process.kill()
        self._idle.clear()
        self._busy.clear()


def serve(end: int) -> None:
    """A reading process: read what comes through the connection until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the scan ends its processes itself
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    connection: Connection[Any, Any] = Connection(end)
    connection.send(None)
    while True:
        try:
            task: SlideTask = connection.recv()
        except EOFError:
            return
        connection.send(_read(task))


def _read(task: SlideTask) -> SlideReading:
    try:
        return read_slide(task)
    except Exception as error:
        return SlideReading(number=task.number, code=ErrorCode.SLIDE_CRASHED, detail=f"reading failed: {error!r}")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
