import os
import subprocess
import sys
from pathlib import Path

import pytest

from pathfed_common import process_lock

HOLDER = """
import sys, time
from pathlib import Path
from pathfed_common import process_lock
held = process_lock.take(Path(sys.argv[1]))
print("held" if held else "taken", flush=True)
if held and len(sys.argv) > 2:
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(600)"])
time.sleep(600 if held else 0)
"""


def holder(path: Path, *words: str, session: bool = True) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), *words], stdout=subprocess.PIPE, text=True, start_new_session=session
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_is_one_processs_until_it_is_closed(tmp_path):
    path = tmp_path / "x.lock"
    assert not process_lock.is_held(path)
    held = process_lock.take(path)
    assert held is not None
    assert process_lock.is_held(path)
    assert process_lock.take(path) is None
    held.close()
    assert not process_lock.is_held(path)


@pytest.mark.parametrize("session", [True, False])
def test_the_holder_is_ended_by_force_and_at_once(tmp_path, session):
    path = tmp_path / "x.lock"
    process = holder(path, session=session)
    with process:
        assert process_lock.end_holder(path)
        assert process.wait(10) == -9
    assert not process_lock.is_held(path)
    assert process_lock.end_holder(path)


def test_what_a_leader_of_a_group_has_started_ends_with_it(tmp_path):
    path = tmp_path / "x.lock"
    process = holder(path, "child")
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "child\n"
        assert process_lock.end_holder(path)
        assert process.stdout.read() == ""  # the pipe closes when the last who holds it has ended


def test_this_process_is_not_ended(tmp_path):
    path = tmp_path / "x.lock"
    with process_lock.take(path):  # type: ignore[union-attr]
        assert not process_lock.end_holder(path, within_s=0.2)


@pytest.mark.parametrize("content", ["", "x", f"{os.getppid()} 1", "1 2 3"])
def test_a_process_that_got_the_number_later_is_not_taken_for_the_holder(tmp_path, content):
    path = tmp_path / "x.lock"
    with process_lock.take(path):  # type: ignore[union-attr]
        path.write_text(content)
        assert process_lock._holder(path) is None
        assert not process_lock.end_holder(path, within_s=0.2)
