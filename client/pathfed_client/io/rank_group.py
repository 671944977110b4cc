"""The ranks of a site: started together, watched, ended together.

Guarantees:

- **All or none.** A rank that ends, fails or is late ends them all, and the caller gets PF911; nothing of the round is left. Nobody hangs:
  every task has a time, and the ranks' own collective operations have the same.
- No rank outlives the site's process, be that killed with -9 (`io.side_process`).
- Secrets and pseudonyms go over a private socket, tiles and states through memory without a name; neither command line nor environment
  nor a file holds any of them. Ranks listen on the loopback interface alone.
- What a rank says of a failure is the type of the error.
"""

import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pathfed_client.io.shared_numbers import Layout, attach, create
from pathfed_client.io.side_process import EndedError, SideProcess
from pathfed_client.training.compute import Compute
from pathfed_client.training.ranks.program import SharedNumbers
from pathfed_client.training.ranks.tasks import Done, Failed, Join, Mode, Outcome, Task
from pathfed_common.code_digest import module_command
from pathfed_common.errors import ErrorCode, HostError

_LOG = logging.getLogger(__name__)
_MODULE = "pathfed_client.io.rank_process"
#: Seconds a rank may take for one task: a patient, a step's noise.
RANK_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """Which ranks there are and what they train.

    Attributes:
        devices: one for each rank.
        mode: how they share the work.
        build: makes the objective; see `ranks.tasks.Join.build`.
        layout: of the shared memory; the tiles' slots are how many patients are read ahead of the ranks.
        compute: how passes are run; the engine is decided.
        tiles_at_once: tiles a rank takes in one pass at most; None: all it has of a patient.
        threads: CPU threads of each rank.
        memory_bytes: the most a rank may take of its GPU's memory; None: all.
    """

    devices: Sequence[torch.device]
    mode: Mode
    build: Callable[[], nn.Module]
    layout: Layout
    compute: Compute
    tiles_at_once: int | None
    threads: int = 1
    memory_bytes: int | None = None


@dataclass(eq=False)
class _Member:
    process: SideProcess
    #: What is to be called with the answer to each task under way.
    asked: deque[Callable[[Outcome], None]] = field(default_factory=deque)


class OutOfStepError(HostError):
    """PF911. `out_of_memory`: a rank ran out of memory."""

    def __init__(self, what: str, value: str, *, out_of_memory: bool = False) -> None:
        remedy = "nothing was released; the kernel's log may say what ended it. The next offer starts the ranks anew"
        super().__init__(ErrorCode.RANK_ENDED, what, value=value, remedy=remedy)
        self.out_of_memory = out_of_memory


class RankGroup:
    """Rank processes and the memory they share. A context manager, for one thread.

    Attributes:
        spec: what was asked for.
        shared: the memory.
    """

    def __init__(self, spec: GroupSpec, *, timeout_s: float = RANK_TIMEOUT_S, command: Sequence[str] | None = None) -> None:
        """Start the ranks and wait until each has built its model.

        Args:
            spec: which ranks.
            timeout_s: seconds a task may take.
            command: what a rank runs.

        Raises:
            HostError: PF903, a process does not start; PF911, a rank failed while it built its model.
        """
        self.spec = spec
        self._memory = create(spec.layout)
        self.shared: SharedNumbers = attach(self._memory, spec.layout)
        self._folder = Path(tempfile.mkdtemp(prefix="pathfed-ranks-"))
        self._members: list[_Member] = []
        started = command or module_command(_MODULE)
        try:
            for _ in spec.devices:
                process = SideProcess(started, [str(self._memory)], timeout_s=timeout_s, pass_fds=[self._memory])
                self._members.append(_Member(process))
            self._join(timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.spec.devices)

    @property
    def is_open(self) -> bool:
        """Whether all ranks live."""
        return bool(self._members) and all(member.process.is_alive for member in self._members)

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        return [member.process.pid for member in self._members]

    def close(self) -> None:
        """End the ranks and give the memory back. Safe to call twice."""
        for member in self._members:
            member.process.end()
        self._members = []
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        shutil.rmtree(self._folder, ignore_errors=True)

    def ask_all(self, task: Task) -> list[Outcome]:
        """Give every rank a task, and wait until all have answered all they were asked.

        Raises:
            HostError: PF911.
        """
        told: list[Outcome] = []
        for rank in range(self.size):
            self.ask(rank, task, told.append)
        self.wait_until(lambda: len(told) == self.size)
        return told

    def ask(self, rank: int, task: Task, then: Callable[[Outcome], None], layout: Layout | None = None) -> None:
        """Give one rank a task; `then` is called with the answer while somebody waits. A rank answers in the order it was asked."""
        if not self._members:
            raise OutOfStepError("the ranks have ended", "they failed before")
        member = self._members[rank]
        if not member.asked:
            member.process.more_time()
        member.asked.append(then)
        member.process.send((task, layout))

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Take answers until something is reached.

        Raises:
            HostError: PF911, a rank ended, failed or was late; then all have ended.
        """
        try:
            while not reached():
                self._take()
        except HostError:
            self.close()
            raise
        except EndedError as error:
            self.close()
            _LOG.error("the ranks were ended: one of them %s", "took too long" if error.late else "ended by itself")
            raise OutOfStepError("a rank did not finish", "took too long" if error.late else "ended by itself") from error

    def _join(self, timeout_s: float) -> None:
        spec = self.spec
        told: list[Outcome] = []
        for rank, device in enumerate(spec.devices):
            job = Join(
                rank=rank,
                ranks=self.size,
                mode=spec.mode,
                device=str(device),
                memory_bytes=spec.memory_bytes,
                threads=spec.threads,
                store=str(self._folder / "store"),
                timeout_s=timeout_s,
                compute=spec.compute,
                tiles_at_once=spec.tiles_at_once,
                tile_px=spec.layout.tiles[2],
                tiles_per_patient=spec.layout.tiles[1],
                build=spec.build,
            )
            self.ask(rank, job, told.append, spec.layout)
        self.wait_until(lambda: len(told) == self.size)

    def _take(self) -> None:
        """Take one answer from each rank that has one."""
        busy = {member.process.connection: (rank, member) for rank, member in enumerate(self._members) if member.asked}
        nearest = min(member.process.deadline for _, member in busy.values())
        ready: list[Any] = wait(list(busy), timeout=max(0.0, nearest - time.monotonic()))
        for rank, member in [busy[end] for end in ready] or list(busy.values()):
            if not ready:
                member.process.check_time()
                continue
            answer = member.process.receive()
            if answer is None:  # the process says that it is ready
                continue
            if isinstance(answer, Failed):
                _LOG.error("rank %d failed: %s", rank, answer.error)
                raise OutOfStepError(f"rank {rank} failed", answer.error, out_of_memory=answer.out_of_memory)
            member.process.more_time()
            member.asked.popleft()(answer)


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """The failures among answers."""
    return [outcome.failure for outcome in outcomes if isinstance(outcome, Done) and outcome.failure is not None]
