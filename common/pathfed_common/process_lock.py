"""Locks that a process holds while it lives, with its id in the file, so that another can end it: a part of `processes`.

The lock is the operating system's (flock): a process that is killed lets go at once, and the file means nothing by itself. Beside the
process's id stands when it was started, so that another process which got the number later is never taken for it (Linux).
"""

import fcntl
import os
import signal
import time
from pathlib import Path
from typing import BinaryIO

_LOOK_AGAIN_S = 0.05


def take(path: Path) -> BinaryIO | None:
    """Take the lock and write this process's id into its file; None: another process holds it.

    The lock lasts until the file that is returned is closed or the process ends; processes started from this one do not inherit it.

    Raises:
        OSError: the file cannot be opened.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{os.getpid()} {_started(os.getpid())}\n".encode())
    file.flush()
    return file


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def end_holder(path: Path, within_s: float = 10.0) -> bool:
    """End the process that holds the lock, at once and by force, with its process group where it leads one.

    Returns:
        Whether nobody holds it now. Of this very process it is never held for long: it is not ended.
    """
    until = time.monotonic() + within_s
    while is_held(path):
        holder = _holder(path)
        if holder is not None and holder != os.getpid():
            _kill(holder)
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_AGAIN_S)
    return True


def _holder(path: Path) -> int | None:
    try:
        number, started = path.read_text(encoding="ascii").split()
        return int(number) if _started(int(number)) == started else None
    except (OSError, ValueError):
        return None  # it has just taken the lock, or let go of it


def _started(process: int) -> str:
    """When a process was started, in the kernel's ticks since it was booted itself."""
    return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]


def _kill(process: int) -> None:
    try:
        if os.getpgid(process) == process:
            os.killpg(process, signal.SIGKILL)
        else:
            os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
