"""How soon a SuperNode or a runner that was killed is missed.

Flower takes one for gone after two heartbeat intervals, 30 seconds each and hard-coded: for a minute the server refuses a SuperNode that
was started again, and a SuperNode waits for a runner that is dead; the round waits for both. Here an interval is half as long. A server
of sixty sites is sent about seven heartbeats a second. A line that is away for less than `2 * INTERVAL_S` is still not noticed; nor does
it matter when it is, since the offer is sent again and the sealed answer too.

The constant is copied into each module that imports it, so each has it replaced; flwr is pinned exactly, and
tests/client/transport/test_heartbeat.py fails when another one reads it.
"""

import importlib
from typing import Any

#: Seconds; SuperLink accepts 10 at least. Flower gives up after two.
INTERVAL_S = 15
_FLOWERS_S = 30
_NAME = "HEARTBEAT_DEFAULT_INTERVAL"
#: SuperNode's own heartbeat, what both processes sleep between two, and how long SuperNode believes in a runner.
READERS = ("flwr.supernode.fleet_http_connection", "flwr.supercore.heartbeat", "flwr.supercore.corestate.in_memory_corestate")


def beat_often() -> None:
    """Make Flower's heartbeats in this process, and its patience with those of others, as short as `INTERVAL_S`. Safe to call twice.

    Raises:
        RuntimeError: Flower has another interval, or keeps it elsewhere; look at it again before raising its pin.
    """
    modules: list[Any] = [importlib.import_module(name) for name in READERS]
    for module in modules:
        if getattr(module, _NAME, None) not in (_FLOWERS_S, INTERVAL_S):
            raise RuntimeError(f"{module.__name__} no longer beats every {_FLOWERS_S} s: look again before raising the pin")
    for module in modules:
        setattr(module, _NAME, INTERVAL_S)
