"""Peak memory of process trees, sampled while they run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from pathfed_server.report.data import MemoryPeak

_MB = 1e6
_SERVER = "server"


@dataclass
class MemoryWatch:
    """Largest resident memory seen so far, MB, of owners (processes with all their descendants) and of each process in them.

    Resident memory counts shared pages once a process, so a sum is an upper bound of what the tree really holds.
    """

    together: dict[str, float] = field(default_factory=dict)
    processes: dict[str, dict[str, float]] = field(default_factory=dict)

    def sample(self, owners: Mapping[str, int]) -> None:
        """Look at every owner's tree now."""
        for owner, pid in owners.items():
            sizes = _tree(pid)
            self.together[owner] = max(self.together.get(owner, 0.0), sum(sizes.values()))
            peaks = self.processes.setdefault(owner, {})
            for name, size in sizes.items():
                peaks[name] = max(peaks.get(name, 0.0), size)

    def peaks(self) -> tuple[MemoryPeak, ...]:
        """What was seen, the server first."""
        owners = sorted(self.together, key=lambda owner: (owner != _SERVER, owner))
        return tuple(
            MemoryPeak(
                owner=owner, role=_role(owner), processes=tuple(sorted(self.processes[owner].items())), together_mb=self.together[owner]
            )
            for owner in owners
        )


def _role(owner: str) -> Literal["site", "server"]:
    return "server" if owner == _SERVER else "site"


def _tree(pid: int) -> dict[str, float]:
    """Resident MB of a process and its descendants, by what they are called; equal names are added up."""
    sizes: dict[str, float] = {}
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return sizes
    for process in tree:
        try:
            name = _name(process.cmdline())
            sizes[name] = sizes.get(name, 0.0) + process.memory_info().rss / _MB
        except psutil.NoSuchProcess:
            continue
    return sizes


def _name(command: list[str]) -> str:
    """A process's name for people: the module after `-m`, or the script."""
    words = [Path(word).name for word in command]
    if "-m" in words:
        return words[words.index("-m") + 1].rpartition(".")[2]
    scripts = [word for word in words if not word.startswith(("-", "python"))]
    return scripts[0] if scripts else "process"
