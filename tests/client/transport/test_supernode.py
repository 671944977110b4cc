"""The launcher shortens one sleep of Flower's SuperNode, and only that. Look here first when flwr's pin moves."""

import ast
import importlib
import inspect
import subprocess
import sys
import types

import pytest

from pathfed_client.transport import supernode

LOOP = "flwr.supernode.start_client_internal"


def _sleeps(source: str) -> list[float]:
    """What a module's `time.sleep` calls are given, in order."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return sorted(ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "time.sleep")


def test_flower_still_sleeps_three_seconds_in_one_place_the_idle_poll_and_half_a_second_elsewhere() -> None:
    source = inspect.getsource(importlib.import_module(LOOP))
    assert _sleeps(source) == [0.5, 0.5, 3]
    loop = source[source.index("while True:") :]
    idle = loop[: loop.index("_push_messages(")]
    assert "if run_id is None:" in idle
    assert idle.rindex("if run_id is None:") < idle.index("time.sleep(3)") < idle.index("continue", idle.index("time.sleep(3)"))


def test_the_launcher_shortens_the_idle_sleep_and_leaves_every_other_alone() -> None:
    """In a process of its own: the launcher changes Flower's module for good."""
    script = f"""
import importlib, time
from pathfed_client.transport import supernode
slept = []
supernode.time.sleep = slept.append
supernode.shorten_idle_sleep()
loop = importlib.import_module({LOOP!r})
for seconds in (3, 0.5, 7):
    loop.time.sleep(seconds)
assert loop.time.monotonic is time.monotonic
print(slept)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == [supernode.IDLE_POLL_S, 0.5, 7]
    assert supernode.IDLE_POLL_S < 3


def test_the_launcher_refuses_a_flower_whose_loop_sleeps_in_another_way(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, LOOP, types.ModuleType(LOOP))
    with pytest.raises(RuntimeError, match="raising the pin"):
        supernode.shorten_idle_sleep()


def test_a_heartbeat_that_dies_ends_the_process_which_would_be_a_zombie_without_it() -> None:
    """Flower's own sender, and what its SuperNode makes of HTTP 500; the health port would go on answering."""
    script = """
import sys, time
import httpx
from flwr.supercore.heartbeat import HeartbeatSender
from pathfed_client.transport import supernode
if sys.argv[1] == "watched":
    supernode.end_with_any_thread()
def beat():
    raise httpx.HTTPStatusError("500", request=httpx.Request("POST", "https://127.0.0.1"), response=httpx.Response(500))
sender = HeartbeatSender(beat)
sender.start()
sender._thread.join()
time.sleep(0.5)
"""
    ended = {
        how: subprocess.run([sys.executable, "-W", "ignore", "-c", script, how], capture_output=True, text=True, check=False)
        for how in ("watched", "left alone")
    }
    assert {how: done.returncode for how, done in ended.items()} == {"watched": supernode.ENDED, "left alone": 0}
    assert "has died" in ended["watched"].stderr
    assert "HTTPStatusError" in ended["watched"].stderr


def test_a_loop_that_is_stuck_ends_the_process_and_one_that_comes_round_does_not() -> None:
    script = """
import sys, time
from pathfed_client.transport import supernode
clock = supernode.shorten_idle_sleep()
supernode.end_when_stuck(clock, within_s=1.0)
for _ in range(20):
    clock.sleep(0.1)
if sys.argv[1] == "stuck":
    time.sleep(60)
"""
    ended = {
        how: subprocess.run([sys.executable, "-W", "ignore", "-c", script, how], capture_output=True, text=True, check=False)
        for how in ("stuck", "well")
    }
    assert {how: done.returncode for how, done in ended.items()} == {"stuck": supernode.ENDED, "well": 0}
    assert "has not come round" in ended["stuck"].stderr


_LATE_REPLY = """
import importlib, sys, types
from flwr.app import Message, RecordDict
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory
from pathfed_client.transport import supernode
loop = importlib.import_module("flwr.supernode.start_client_internal")
state = NodeStateFactory(ObjectStoreFactory()).state()
taken = []
loop._pull_and_store_message = lambda **given: taken.append(sorted(given)) or (7 if len(taken) == 1 else None)
if sys.argv[1] == "sending":
    supernode.send_every_reply()
take = loop._pull_and_store_message
told = [take(state=state, receive=None), take(state=state, receive=None)]  # a message, and then none
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
asked = Message(RecordDict(), dst_node_id=1, message_type="train")
asked.metadata.__dict__["_message_id"] = "asked"
reply = Message(RecordDict(), reply_to=asked)
reply.metadata.__dict__["_message_id"] = "reply"
state.store_message(asked)
told.append(take(state=state, receive=None))  # a message that waits to be worked on is no reply
state.store_message(reply)
told.append(take(state=state, receive=None))
found = [one.metadata.message_id for one in state.get_messages_legacy(is_reply=True)]
told.append(take(state=state, receive=None))
assert found == ["reply"], "the question did not take it"
assert taken == [["receive", "state"]] * 5
print([one is not None for one in told])
"""


def test_a_reply_that_comes_uncounted_is_sent_though_no_message_comes() -> None:
    """With Flower's own state of a SuperNode. Left alone, the loop would pass the reply over until another message comes."""
    found = {}
    for how in ("sending", "left alone"):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", _LATE_REPLY, how], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[how] = ast.literal_eval(done.stdout)
    assert found == {"sending": [True, False, False, True, False], "left alone": [True, False, False, False, False]}


def test_flowers_loop_compares_what_it_is_told_with_none_alone_and_then_sends_every_reply() -> None:
    source = inspect.getsource(importlib.import_module(LOOP))
    body = source[source.index("run_id = _pull_and_store_message(") : source.index("def _insert_message(")]
    assert body.count("run_id") == 2, "once given, once compared"
    assert "state=state," in body
    assert "if run_id is None:" in body
    assert "while not (reply_messages := state.get_messages_legacy(is_reply=True)):" in source


def test_the_launcher_refuses_a_flower_that_takes_messages_in_another_way(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, LOOP, types.ModuleType(LOOP))
    with pytest.raises(RuntimeError, match="raising the pin"):
        supernode.send_every_reply()
