"""What tests of commands share: a command line run in this process, and a disk that is soon full."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_CAP_SYS_ADMIN = 21


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def code(self) -> str:
        """The code of the error that `--json` printed."""
        return str(self.json["error"]["code"])


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command's `main`, exit status and all, in this process: `run_main(main, name, *arguments)`."""

    def call(main: Callable[[], None], name: str, *arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return Done(int(ended.value.code or 0), told.out, told.err)

    return call


def _may_mount() -> bool:
    """Whether this process has the kernel's right to mount (CAP_SYS_ADMIN), which a container takes even from root."""
    held = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return held is not None and bool(int(held.group(1), 16) >> _CAP_SYS_ADMIN & 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        reason = f"needs the right to mount a small disk, as root has it: {mounted.stderr.strip()}"
        if os.environ.get("CI") and _may_mount():
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
