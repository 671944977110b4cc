"""The control plane under Atheris, for a bounded number of inputs; `tests/fuzz/control_messages.py` runs it for longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[2] / "fuzz" / "control_messages.py"


def test_no_message_that_the_fuzzer_finds_fails_inside(tmp_path):
    pytest.importorskip("atheris", reason="Atheris has wheels for Linux alone")
    argv = [sys.executable, HARNESS, tmp_path / "corpus", "-runs=3000", "-seed=1", "-max_len=4096", "-timeout=60", "-print_final_stats=1"]
    # libFuzzer takes the peak of the process that started it for its own: a test process that has grown would end it.
    argv.append("-rss_limit_mb=0")
    # Atheris ends the process without tidying up, so what it makes is made here.
    done = subprocess.run(
        argv, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stat::number_of_executed_units: 3" in done.stderr
