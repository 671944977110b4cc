"""Flower's node authentication, recorded on the wire and tried again. It signs a time and a key, not the message: what holds is here."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

from pathfed_server.transport.flower_control import FlowerControl

UNAUTHENTICATED = 401


@dataclass(frozen=True)
class Recorded:
    """A request as it went over the wire."""

    url: httpx.URL
    headers: dict[str, str]
    body: bytes

    def again(self, ca: Path, **changes: str) -> int:
        """Send it again, with some headers changed; the status of the answer."""
        context = ssl.create_default_context(cafile=str(ca))
        with httpx.Client(verify=context, trust_env=False) as client:
            return client.post(self.url, headers={**self.headers, **changes}, content=self.body).status_code


@pytest.fixture
def signed_in(sign_in) -> Callable[[str], Recorded]:
    """Sign a node in through the fleet door, and record its heartbeat."""

    def sign_in_and_record(name: str) -> Recorded:
        found: list[Recorded] = []

        class Record:
            def intercept(self, context, call_next):
                request = context.request
                headers = {name: value for name, value in request.headers.items() if name != "content-length"}
                found.append(Recorded(request.url, headers, request.read()))
                return call_next(context)

        made = sign_in(name, Record())
        made.client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=made.node, heartbeat_interval=30.0))
        return found[-1]

    return sign_in_and_record


def test_a_recorded_heartbeat_is_worth_nothing_once_the_site_is_revoked(engine, signed_in):
    recorded = signed_in("north")
    assert recorded.again(engine.ca) == httpx.codes.OK, "within five minutes Flower takes it: TLS keeps it from being recorded"
    with FlowerControl(f"127.0.0.1:{engine.superlink_port}", engine.ca) as control:
        control.ensure_nodes([])  # what the daemon does when a site is revoked
    assert recorded.again(engine.ca) == UNAUTHENTICATED


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_recorded_heartbeat_is_not_carried_to_another_time(engine, signed_in, seconds):
    """The time is what is signed: an old one is out of the window, and a changed one is not signed."""
    recorded = signed_in("north")
    signed_at = datetime.fromisoformat(recorded.headers[TIMESTAMP_HEADER.lower()])
    for shift in (seconds, 1):
        changed = (signed_at + timedelta(seconds=shift)).isoformat()
        assert recorded.again(engine.ca, **{TIMESTAMP_HEADER.lower(): changed}) == UNAUTHENTICATED


def test_one_nodes_sign_in_does_not_speak_for_another(engine, signed_in):
    north = signed_in("north")
    south = signed_in("south")
    mixed = Recorded(north.url, south.headers, north.body)
    assert mixed.again(engine.ca) == UNAUTHENTICATED
