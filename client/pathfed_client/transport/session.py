"""A new session with SuperLink where an answer was cut on its way: an offer may have been lost with it.

SuperLink counts a message as delivered when it answers the question for one, whether or not the answer arrives. A line, a relay or a fleet
door that fails in that moment takes the offer with it: the SuperNode asks again and is told that there is none, and the round waits for the
site until its deadline. The server sends an offer again to a SuperNode that is in another session than the one it sent to
(`pathfed_server.transport.flower_server`). So one is begun: the node signs off and beats at once, which SuperLink takes for a new one.

That is done when SuperLink has said that there is no message: then none is in hand here, and a site is asked twice for nothing only where
it has answered already, which costs a sealed answer sent again.

flwr is pinned exactly, and tests/server/transport/test_new_session.py holds this against the real SuperLink.
"""

import importlib
import logging
from contextlib import suppress
from functools import wraps
from typing import Any

import httpx
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node

from pathfed_client.transport.heartbeat import INTERVAL_S

_CLIENT = "flwr.supernode.fleet_http_client"
#: Nothing was asked where no connection was made.
_UNASKED = (httpx.ConnectError, httpx.ConnectTimeout)
_log = logging.getLogger("flwr")


def renew_after_cut() -> None:
    """Make the SuperNode in this process begin a new session after a question for messages whose answer was cut. Once is enough.

    Raises:
        RuntimeError: Flower asks in another way; look at it again before raising its pin.
    """
    client: Any = getattr(importlib.import_module(_CLIENT), "FleetHttpClient", None)
    ask: Any = getattr(client, "PullMessages", None)
    if ask is None:
        raise RuntimeError(f"{_CLIENT} no longer asks by `FleetHttpClient.PullMessages`: look again before raising the pin")
    if hasattr(ask, "__wrapped__"):
        return
    cut = False

    @wraps(ask)
    def ask_again_in_a_new_session(self: Any, request: Any) -> Any:
        nonlocal cut
        try:
            answer = ask(self, request)
        except _UNASKED:
            raise
        except httpx.HTTPError:
            cut = True
            raise
        if cut and not answer.messages_list:
            _begin_anew(self, request.node)
            cut = False
        return answer

    client.PullMessages = ask_again_in_a_new_session


def _begin_anew(client: Any, node: Node) -> None:
    """Sign off and beat; what the line does to either, the caller's next question finds."""
    with suppress(httpx.HTTPStatusError):  # SuperLink counts the node as gone already
        client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
    client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=INTERVAL_S))
    _log.info("an answer was cut, and an offer may have been lost with it: a new session has begun")
