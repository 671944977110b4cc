"""A SuperNode whose question for messages was cut is in a new session with the real SuperLink afterwards; otherwise it stays in its own."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message
from flwr.proto.node_pb2 import Node
from flwr.supernode.fleet_http_client import FleetHttpClient

from pathfed_client.transport import session
from pathfed_server.transport.flower_control import FlowerControl

ASKED = "pull-messages"


@dataclass
class Line:
    """A line that fails once SuperLink has answered: for each failure the end of the path, and what the SuperNode sees."""

    fails: list[tuple[str, Callable[[], Exception]]] = field(default_factory=list)

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        answer = call_next(context)
        if self.fails and context.request.url.path.endswith(self.fails[0][0]):
            raise self.fails.pop(0)[1]()
        return answer


@dataclass
class Asking:
    """A node that asks SuperLink for messages through the fleet door."""

    engine: Any
    client: FleetHttpClient
    public: bytes
    line: Line
    node: Node

    def ask(self) -> PullMessagesResponse:
        answer: PullMessagesResponse = self.client.PullMessages(PullMessagesRequest(node=self.node))
        return answer

    def session(self) -> tuple[str, str]:
        """When the session began, and how SuperLink sees the node."""
        with FlowerControl(f"127.0.0.1:{self.engine.superlink_port}", self.engine.ca) as control:
            (found,) = [one for one in control._client.ListNodes(ListNodesRequest()).nodes_info if bytes(one.public_key) == self.public]
        return found.last_activated_at, found.status


@pytest.fixture
def asking(engine, sign_in, monkeypatch) -> Asking:
    monkeypatch.setattr(FleetHttpClient, "PullMessages", FleetHttpClient.PullMessages)  # put back afterwards
    session.renew_after_cut()
    line = Line()
    made = sign_in("north", line)
    return Asking(engine, made.client, made.public, line, made.node)


def cut() -> Exception:
    return httpx.ReadError("cut")


def unavailable() -> Exception:
    request = httpx.Request("POST", "https://127.0.0.1/")
    return httpx.HTTPStatusError("503", request=request, response=httpx.Response(503, request=request))


CUTS = (cut, lambda: httpx.RemoteProtocolError("closed"), lambda: httpx.ReadTimeout("slow"), unavailable)


@pytest.mark.parametrize("failure", CUTS)
def test_a_question_whose_answer_was_cut_is_followed_by_a_new_session(asking: Asking, failure: Callable[[], Exception]) -> None:
    asking.ask()
    before, _ = asking.session()
    asking.line.fails.append((ASKED, failure))
    with pytest.raises(httpx.HTTPError):
        asking.ask()
    assert asking.session()[0] == before, "not before SuperLink has said that there is no message"
    asking.ask()
    after, status = asking.session()
    assert after > before
    assert status == "online"
    asking.ask()
    assert asking.session()[0] == after, "once"


def test_a_question_that_was_never_asked_changes_nothing(asking: Asking) -> None:
    before = asking.session()
    asking.line.fails.append((ASKED, lambda: httpx.ConnectError("refused")))
    with pytest.raises(httpx.ConnectError):
        asking.ask()
    asking.ask()
    assert asking.session() == before


@pytest.mark.parametrize("at", ["deactivate-node", "send-node-heartbeat"])
def test_a_change_of_session_that_is_cut_itself_is_made_by_the_next_question(asking: Asking, at: str) -> None:
    before, _ = asking.session()
    asking.line.fails += [(ASKED, cut), (at, cut)]
    with pytest.raises(httpx.ReadError):
        asking.ask()
    with pytest.raises(httpx.ReadError):
        asking.ask()
    asking.ask()
    after, status = asking.session()
    assert after > before
    assert status == "online"


def test_no_session_is_begun_while_a_message_is_in_hand(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be sent again for nothing. What may have been lost beside it is asked for when SuperLink has no more."""
    before, _ = asking.session()
    asking.line.fails.append((ASKED, cut))
    with pytest.raises(httpx.ReadError):
        asking.ask()
    real = FleetHttpClient._unary_unary
    full = PullMessagesResponse(messages_list=[Message()])
    monkeypatch.setattr(FleetHttpClient, "_unary_unary", lambda *given, **named: full)
    assert asking.ask().messages_list
    monkeypatch.setattr(FleetHttpClient, "_unary_unary", real)
    assert asking.session()[0] == before
    asking.ask()
    assert asking.session()[0] > before


def test_the_launcher_refuses_a_flower_that_asks_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FleetHttpClient, "PullMessages")
    with pytest.raises(RuntimeError, match="raising the pin"):
        session.renew_after_cut()
