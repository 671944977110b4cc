"""A site reaches `/v1/fleet/` and neither control nor runtime, however the path is spelled. Against a real SuperLink."""

import http.client
import ssl
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_server.transport.path_filter import BODY_LIMIT, FLEET, SITE_BURST, passes

CONTROL = "/v1/control/list-runs"
RUNTIME = "/v1/runtime/acquire-task"
FLEET_PATH = "/v1/fleet/pull-messages"
SPELLINGS = (
    CONTROL,
    RUNTIME,
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "//v1/control/list-runs",
    "/v1/fleet//../control/list-runs",
    "/V1/FLEET/pull-messages",
    "/v1/fleet/",
    "/v1/fleet",
    "/v1/fleet/..\\control\\list-runs",
    "/docs",
    "/openapi.json",
    "/health",
    "/",
)


@given(st.binary(max_size=60))
def test_only_plain_fleet_paths_pass(path: bytes) -> None:
    if passes(path):
        assert path.startswith(FLEET)
        assert path != FLEET
        assert not any(part in path for part in (b"..", b"%", b"//", b"\\"))


@given(st.from_regex(r"/v1/fleet/[a-z-]{1,40}", fullmatch=True))
def test_every_plain_fleet_path_passes(path: str) -> None:
    assert passes(path.encode())


def _status(port: int, ca: object, path: str, method: str = "POST", headers: dict[str, str] | None = None, body: bytes | None = b"") -> int:
    context = ssl.create_default_context(cafile=str(ca))
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=False)  # http.client sends the path as it is given
        for name, value in {"Content-Length": str(len(body or b"")), **(headers or {})}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("path", SPELLINGS)
def test_the_door_refuses_everything_but_fleet_paths(engine, path: str) -> None:
    assert _status(engine.fleet_port, engine.ca, path) == 404
    assert _status(engine.fleet_port, engine.ca, path, method="GET", body=None) == 404


def test_superlink_itself_does_answer_control_and_runtime(engine) -> None:
    """The door is what protects them: without it both would answer."""
    assert _status(engine.superlink_port, engine.ca, CONTROL) == 415
    assert _status(engine.superlink_port, engine.ca, RUNTIME) == 415


def test_the_door_passes_fleet_paths_on(engine) -> None:
    through, straight = (_status(port, engine.ca, FLEET_PATH) for port in (engine.fleet_port, engine.superlink_port))
    assert through == straight == 415  # SuperLink's own answer to an empty body


def test_a_body_above_the_limit_is_refused_before_superlink_sees_it(engine) -> None:
    assert _status(engine.fleet_port, engine.ca, FLEET_PATH, headers={"Content-Length": str(10**9)}, body=None) == 413


def test_a_body_without_a_stated_length_is_cut_at_the_limit(engine) -> None:
    context = ssl.create_default_context(cafile=str(engine.ca))
    connection = http.client.HTTPSConnection("127.0.0.1", engine.fleet_port, context=context, timeout=20)
    sent = [0]

    def endless() -> Iterator[bytes]:
        while sent[0] < 64:
            sent[0] += 1
            yield bytes(BODY_LIMIT // 4)

    try:
        with suppress(OSError):  # the door closes while more is on its way
            connection.request("POST", FLEET_PATH, body=endless(), encode_chunked=True)
        assert connection.getresponse().status == 413
    finally:
        connection.close()


def test_a_site_that_sends_without_end_is_stopped_and_no_other_one(engine) -> None:
    def send(key: str) -> int:
        headers = {"flwr-public-key-bin": key, "Content-Type": "application/octet-stream"}
        return _status(engine.fleet_port, engine.ca, FLEET_PATH, headers=headers, body=bytes(BODY_LIMIT))

    answers = [send("loud") for _ in range(SITE_BURST // BODY_LIMIT)]
    assert 429 not in answers[:-1]
    assert answers[-1] == 429, "with what the requests themselves count, the last one is too much"
    assert send("quiet") == answers[0]


def test_methods_other_than_get_and_post_are_refused(engine) -> None:
    assert _status(engine.fleet_port, engine.ca, FLEET_PATH, method="PUT") == 405


def test_a_client_that_does_not_know_the_ca_is_not_served(engine) -> None:
    stranger = http.client.HTTPSConnection("127.0.0.1", engine.fleet_port, context=ssl.create_default_context(), timeout=10)
    with pytest.raises(ssl.SSLCertVerificationError):
        stranger.request("POST", FLEET_PATH)
