"""Reading slides in processes of this machine, so that a slide that crashes or hangs its decoder costs that slide and nothing else.

Each process reads one slide at a time, so it is always known whose fault an ending was. Guarantees:

- a process that ends, whatever ended it, gives its slide the code PF220 and is replaced;
- a slide that takes longer than the limit is given up with PF221, its process killed and replaced;
- no process outlives the scan, be it killed with -9 (the kernel ends them with their parent);
- where memory runs out, the kernel ends a reading process before the scan;
- a decoder's own messages, which may name files, go nowhere.
"""

import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

from pathfed_client.io import side_process
from pathfed_client.io.scan_reading import SlideReading, SlideTask, read_slide
from pathfed_client.io.side_process import EndedError, SideProcess
from pathfed_common.code_digest import module_command
from pathfed_common.errors import ErrorCode

#: Seconds a slide may take.
SLIDE_TIMEOUT_S = 300.0
_MODULE = "pathfed_client.io.scan_workers"


def usable_cpus() -> int:
    """The CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


class ProcessExecutor:
    """Reads slides in a fixed number of processes; implements `SlideExecutor`. A context manager."""

    def __init__(self, workers: int, *, timeout_s: float = SLIDE_TIMEOUT_S, command: Sequence[str] = ()) -> None:
        """Make the executor; processes start with the first slides.

        Args:
            workers: reading processes, at least 1.
            timeout_s: seconds a slide may take.
            command: what a reading process runs; empty: this module.
        """
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.slots = workers
        self._timeout_s = timeout_s
        self._command = command or module_command(_MODULE)
        self._idle: list[SideProcess] = []
        self._busy: dict[Any, tuple[SideProcess, SlideTask]] = {}

    def __enter__(self) -> "ProcessExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: SlideTask, /) -> None:
        """See `SlideExecutor`."""
        process = self._living() or SideProcess(self._command, timeout_s=self._timeout_s)
        self._busy[process.connection] = (process, task)
        process.more_time()
        process.send(task)

    def _living(self) -> SideProcess | None:
        """An idle process. One that was ended while it had nothing to do is no slide's fault."""
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            process.end()
        return None

    def finished(self) -> Sequence[SlideReading]:
        """See `SlideExecutor`."""
        done: list[SlideReading] = []
        while not done:
            nearest = min(process.deadline for process, _ in self._busy.values())
            told = wait(list(self._busy), timeout=max(0.0, nearest - time.monotonic()))
            for end in [*told, *(end for end in self._busy if end not in told)]:
                reading = self._taken(end, told=end in told)
                if reading is not None:
                    done.append(reading)
        return done

    def _taken(self, end: Any, *, told: bool) -> SlideReading | None:
        """The reading of one process, if it has come to an end in one way or another."""
        process, task = self._busy[end]
        try:
            if not told:
                process.check_time()
                return None
            reading: SlideReading | None = process.receive()
        except EndedError as error:
            del self._busy[end]
            code = ErrorCode.SLIDE_TIMEOUT if error.late else ErrorCode.SLIDE_CRASHED
            return SlideReading(number=task.number, code=code, detail=str(error))
        if reading is not None:
            del self._busy[end]
            self._idle.append(process)
        return reading

    def close(self) -> None:
        """See `SlideExecutor`."""
        for process in (*self._idle, *(process for process, _ in self._busy.values())):
            process.end()
        self._idle.clear()
        self._busy.clear()


def serve(end: int) -> None:
    """A reading process: read what comes through the connection until it closes."""
    side_process.serve(end, _read)


def _read(task: SlideTask) -> SlideReading:
    try:
        return read_slide(task)
    except Exception as error:
        # A process's edge: a bug that one slide meets must cost that slide, not the scan.
        return SlideReading(number=task.number, code=ErrorCode.SLIDE_CRASHED, detail=f"reading failed: {error!r}")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
