"""Kills processes of a running demo."""

import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from kill_world import KINDS

_TICK_S = 0.1


#: Words of a command that the demo runs -> most seconds it has when it is killed; each is killed once.
COMMANDS = {"init": 2.0, "enroll": 2.0, "publish": 2.0, "scan": 4.0, "approve": 2.0, "run start": 2.0, "release create": 3.0, "verify": 4.0}


def killed_while_it_runs(
    demo: "subprocess.Popen[str]",
    out: Path,
    processes_of: Callable[[Path], list[psutil.Process]],
    kinds: Sequence[str],
    rng: random.Random,
    *,
    between_s: tuple[float, float],
) -> list[str]:
    """Kill each of `COMMANDS` once, and a process of each kind, one after the other, while the round loop runs; which were killed.

    Args:
        demo: the demo.
        out: its folder.
        processes_of: the living processes that name a folder.
        kinds: of `KINDS`, in this order; a kind that is not there now is waited for.
        rng: chooses the process where there are several, and the time between two kills.
        between_s: least and most seconds between two kills.
    """
    killed: list[str] = []
    waiting, due = list(kinds), 0.0
    commands = dict(COMMANDS)
    while demo.poll() is None:
        there = [(each, _command(each)) for each in processes_of(out) if each.pid != demo.pid]
        for words in list(commands):
            for process, command in there:
                if f" {words} " in command and "/pathfed" in command and _age_s(process) > rng.uniform(0.0, commands[words]):
                    _kill(process)
                    killed.append(words)
                    del commands[words]
                    break
        if waiting and (out / "server" / "logs" / "server-app.log").exists() and time.monotonic() >= due:
            found = [process for process, command in there if all(word in command for word in KINDS[waiting[0]][0])]
            if found:
                _kill(rng.choice(found))
                killed.append(waiting.pop(0))
                due = time.monotonic() + rng.uniform(*between_s)
        time.sleep(_TICK_S)
    return killed


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _age_s(process: psutil.Process) -> float:
    try:
        return time.time() - float(process.create_time())
    except psutil.Error:
        return 0.0


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.send_signal(signal.SIGKILL)
