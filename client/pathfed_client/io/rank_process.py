"""A rank: started by the site's process (`io.rank_group`), told what to do over a socket that only the two have.

Ranks find each other by a file in a private folder and talk over the loopback interface alone (gloo on the CPU, NCCL between GPUs of this
machine). The environment variables that a worker of torchrun has are set too, for libraries that look for them.
"""

import os
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from pathfed_client.io.shared_numbers import Layout, attach
from pathfed_client.io.side_process import serve
from pathfed_client.training.device import limit_memory
from pathfed_client.training.engines.serial import out_of_memory
from pathfed_client.training.ranks.group import ProcessRanks
from pathfed_client.training.ranks.program import RankProgram
from pathfed_client.training.ranks.tasks import Begin, Done, EndStep, Failed, Join, Outcome, Patient, StepDone, Task, Try


class Rank:
    """Works off tasks; what one of them raises is told by its type, and the site's process then ends all ranks."""

    def __init__(self, memory: int) -> None:
        """Take the shared memory's file descriptor."""
        self._memory = memory
        self._program: RankProgram | None = None

    def __call__(self, task: tuple[Task, Layout | None]) -> Outcome:
        """Do a task; `Join` comes with the layout of the shared memory."""
        try:
            return self._do(*task)
        except Exception as error:
            # The edge of this process. Nothing but the type leaves it: a text could name a slide, a traceback hold a gradient.
            return Failed(type(error).__name__, out_of_memory(error))

    def _do(self, task: Task, layout: Layout | None) -> Outcome:
        if isinstance(task, Join):
            if layout is None:
                raise ValueError("a rank joins with the layout of the shared memory")
            self._program = _joined(task, self._memory, layout)
            return Done()
        if self._program is None:
            raise ValueError("a rank must join first")
        if isinstance(task, Patient):
            return Done(self._program.patient(task))
        if isinstance(task, EndStep):
            return StepDone(self._program.end_step())
        if isinstance(task, Begin):
            self._program.begin(task)
            return Done()
        if isinstance(task, Try):
            return Done(self._program.attempt())
        raise ValueError(f"a rank does not know what {type(task).__name__} is")


def _joined(job: Join, memory: int, layout: Layout) -> RankProgram:
    device = torch.device(job.device)
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    os.environ |= {**loopback, "RANK": str(job.rank), "LOCAL_RANK": str(job.rank), "WORLD_SIZE": str(job.ranks)}
    torch.set_num_threads(job.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if job.memory_bytes is not None:
        limit_memory(device, job.memory_bytes)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=FileStore(job.store, job.ranks),
        rank=job.rank,
        world_size=job.ranks,
        timeout=timedelta(seconds=job.timeout_s),
    )
    return RankProgram(job, ProcessRanks(device), attach(memory, layout))


def main(arguments: list[str], work: type[Rank] = Rank) -> None:
    """A rank process: the number of its end of the socket, and that of the shared memory."""
    end, memory = (int(word) for word in arguments)
    rank: Any = work(memory)
    with suppress(BrokenPipeError, ConnectionResetError):  # the site's process ended while this one worked
        serve(end, rank)
    os._exit(0)  # no farewell to ranks that may be gone


if __name__ == "__main__":
    main(sys.argv[1:])
