"""Real processes with memory that can be told apart."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathfed_local.memory import MemoryWatch

HELD_MB = 150
#: A child that holds memory, and starts one that holds as much.
SCRIPT = f"""
import subprocess, sys
held = b"x" * ({HELD_MB} * 1000 * 1000)
inner = subprocess.Popen([sys.executable, "-c", "held = b'x' * ({HELD_MB} * 1000 * 1000); print('held', flush=True); input()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
inner.stdout.readline()
print("held", flush=True)
input()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    script = tmp_path / "holder.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_an_owners_memory_is_that_of_its_whole_tree_by_process(holder):
    watch = MemoryWatch()
    watch.sample({"site-a": holder.pid})
    assert 2 * HELD_MB < watch.together["site-a"] < 2 * HELD_MB + 200
    assert watch.processes["site-a"]["holder.py"] > HELD_MB


def test_a_peak_stays_when_its_process_is_gone(holder):
    watch = MemoryWatch()
    watch.sample({"site-a": holder.pid})
    peak = watch.together["site-a"]
    holder.kill()
    holder.wait()
    watch.sample({"site-a": holder.pid})
    watch.sample({"site-a": os.getpid()})
    assert watch.together["site-a"] >= peak


def test_the_server_comes_first_and_each_has_its_own_limit(holder):
    watch = MemoryWatch()
    watch.sample({"a-site": holder.pid, "server": os.getpid()})
    server, site = watch.peaks()
    assert [(server.owner, server.role), (site.owner, site.role)] == [("server", "server"), ("a-site", "site")]
    assert server.limit_mb < site.limit_mb
    assert site.together_mb >= max(size for _, size in site.processes)
