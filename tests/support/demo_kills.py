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

_TICK_S = 0.2


def killed_while_it_runs(
    demo: "subprocess.Popen[str]",
    out: Path,
    processes_of: Callable[[Path], list[psutil.Process]],
    kinds: Sequence[str],
    rng: random.Random,
    *,
    between_s: tuple[float, float],
) -> list[str]:
    """Kill a process of each kind, one after the other, from when the round loop runs until the demo has ended; which ones were.

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
    while demo.poll() is None and waiting:
        if (out / "server" / "logs" / "server-app.log").exists() and time.monotonic() >= due:
            there = [each for each in processes_of(out) if _is(each, waiting[0])]
            if there:
                with suppress(psutil.Error):
                    rng.choice(there).send_signal(signal.SIGKILL)
                    killed.append(waiting.pop(0))
                    due = time.monotonic() + rng.uniform(*between_s)
        time.sleep(_TICK_S)
    return killed


def _is(process: psutil.Process, kind: str) -> bool:
    words, _ = KINDS[kind]
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return all(any(word in part for part in command) for word in words)
