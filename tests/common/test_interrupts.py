"""Being asked to end, in processes of their own."""

import signal
import subprocess
import sys

import pytest

#: A long-running command in which a library swallows the first interrupt, as a bare `except` around an import does.
SWALLOWED = """
import sys, time
from pathfed_common import interrupts
from pathfed_common.processes import Supervisor

interrupts.end_on_terminate()
try:
    print("ready", flush=True)
    time.sleep(60)
except BaseException:
    pass
{turn}
"""
LOOPS = {
    "a loop that asks": "interrupts.heed()",
    "a loop that watches its children": "Supervisor().poll()",
    "a demo that begins a command": "from pathfed_local.consortium import Consortium; "
    "from pathlib import Path; Consortium(Path('no'), []).begin('pathfed-site')",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
@pytest.mark.parametrize("turn", LOOPS.values(), ids=LOOPS)
def test_an_interrupt_that_was_swallowed_takes_effect_at_the_next_turn(turn: str, number: signal.Signals, tmp_path) -> None:
    script = SWALLOWED.format(turn=turn)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert list(tmp_path.iterdir()) == [], "nothing more was begun"


def test_nobody_asked_nobody_ends() -> None:
    script = "from pathfed_common import interrupts; interrupts.end_on_terminate(); interrupts.heed(); print('on')"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "on\n"
