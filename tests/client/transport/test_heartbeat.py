"""A SuperNode and a runner that were killed are missed after half a minute. Look here first when flwr's pin moves."""

import subprocess
import sys
import types
from pathlib import Path

import flwr
import pytest

from pathfed_client.transport import heartbeat

#: They read the interval too, in processes of the server: for nodes that never connect, and for tasks of its round loop, which
#: `pathfed_server.driving` and the daemon look after.
ELSEWHERE = {"flwr.superlink.servicer.control.control_handlers", "flwr.supercore.corestate.sql_corestate"}


def test_nobody_else_at_a_site_reads_the_interval() -> None:
    root = Path(flwr.__file__).parent
    found = {
        ".".join(("flwr", *path.relative_to(root).with_suffix("").parts))
        for path in root.rglob("*.py")
        if "HEARTBEAT_DEFAULT_INTERVAL" in path.read_text(encoding="utf-8")
    }
    assert found - ELSEWHERE - {"flwr.common.constant"} == {*heartbeat.READERS}


_KILLED = """
import sys
from datetime import timedelta
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supercore.constant import TaskType
from pathfed_client.transport.heartbeat import beat_often
if sys.argv[1] == "often":
    beat_often()
    beat_often()
began = in_memory_corestate.now()
clock = {"s": 0.0}
in_memory_corestate.now = lambda: began + timedelta(seconds=clock["s"])
state = NodeStateFactory(ObjectStoreFactory()).state()
task = state.create_task(TaskType.CLIENT_APP, run_id=7)
token = state.claim_task(task)
assert state.activate_task(task)
while state.get_task_by_token(token) is not None:
    clock["s"] += 1.0
print(clock["s"])
"""


def test_a_task_whose_runner_was_killed_is_given_up_after_two_intervals() -> None:
    """With Flower's own state of a SuperNode, in a process of its own: its module is changed for good."""
    given_up = {}
    for how in ("often", "left alone"):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", _KILLED, how], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        given_up[how] = float(done.stdout)
    assert given_up["often"] == pytest.approx(2 * heartbeat.INTERVAL_S, abs=1.0)
    assert given_up["left alone"] == pytest.approx(60.0, abs=1.0)


def test_a_flower_that_beats_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, heartbeat.READERS[1], types.ModuleType(heartbeat.READERS[1]))
    with pytest.raises(RuntimeError, match="raising the pin"):
        heartbeat.beat_often()
