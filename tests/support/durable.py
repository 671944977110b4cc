"""What must hold when power is lost between two writes: nothing is renamed, or counts, before what it rests on is on the disk.

A killed process leaves everything it has written in the machine's memory; power loss takes what was not flushed. No test can cut the power,
so this watches the order: bytes are flushed before the file gets its name, and folders before a fact in a database names what they hold.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Journal:
    """Watches one folder's writes in this process.

    Attributes:
        wrong: what was done in the wrong order.
        renamed: how many files got their names.
        counted: what was called that makes a fact of what was written.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root.resolve())
        self._began = time.time_ns()
        #: (device, inode) -> (bytes, time of the last change) when it was flushed last.
        self._flushed: dict[tuple[int, int], tuple[int, int]] = {}
        self._unflushed_folders: set[str] = set()
        self.wrong: list[str] = []
        self.renamed = 0
        self.counted: list[str] = []

    @contextmanager
    def watching(self, *facts: tuple[object, str]) -> Iterator["Journal"]:
        """Watch what happens inside; each of `facts`, an owner and the name of its method, makes what was written count."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self._fsync(os.fsync))
            for name in ("replace", "rename"):
                patch.setattr(os, name, self._rename(getattr(os, name)))
            patch.setattr(os, "mkdir", self._mkdir(os.mkdir))
            for owner, name in facts:
                patch.setattr(owner, name, self._fact(name, getattr(owner, name)))
            yield self

    def _fsync(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def flushed(handle: int) -> None:
            fsync(handle)
            found = os.fstat(handle)
            if stat.S_ISDIR(found.st_mode):
                self._unflushed_folders.discard(str(Path(f"/proc/self/fd/{handle}").readlink()))
            else:
                self._flushed[found.st_dev, found.st_ino] = found.st_size, found.st_mtime_ns

        return flushed

    def _rename(self, rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            place = os.path.realpath(target)
            if place.startswith(self._root):
                found = os.stat(source)  # noqa: PTH116 - what os.replace was given
                flushed = self._flushed.get((found.st_dev, found.st_ino))
                if found.st_mtime_ns > self._began and flushed != (found.st_size, found.st_mtime_ns):
                    self.wrong.append(f"{place} got its name before its bytes were flushed")
                self._unflushed_folders.add(os.path.dirname(place))  # noqa: PTH120
                self.renamed += 1
            rename(source, target, **options)

        return renamed

    def _mkdir(self, mkdir: Callable[..., None]) -> Callable[..., None]:
        def made(path: Any, *args: Any, **options: Any) -> None:
            mkdir(path, *args, **options)
            if os.path.realpath(path).startswith(self._root):
                self._unflushed_folders.add(os.path.dirname(os.path.realpath(path)))  # noqa: PTH120

        return made

    def _fact(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counts(*args: Any, **kwargs: Any) -> Any:
            self.wrong += [f"{name} counts what {folder} holds, which is not flushed" for folder in sorted(self._unflushed_folders)]
            self.counted.append(name)
            return work(*args, **kwargs)

        return counts
