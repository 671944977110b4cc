"""The round loop's process ends with the one that started it."""

import os
import signal
import subprocess
import sys
import time

import psutil

CHILD = "from pathfed_server.driving import end_with_parent; import time; end_with_parent(); print('ready', flush=True); time.sleep(600)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_round_loop_whose_superexec_is_killed_ends_by_itself():
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            time.sleep(2.5)
            assert child.is_running(), "it does not end while its parent lives"
            os.kill(parent.pid, signal.SIGKILL)
            parent.wait()
            _, alive = psutil.wait_procs([child], timeout=60)
            assert not alive
        finally:
            parent.kill()
