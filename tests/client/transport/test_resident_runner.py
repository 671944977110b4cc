"""What the runner does with a task, with Flower's own message, context and bundle values. The whole way is in tests/end_to_end."""

import hashlib
import io
import zipfile
from typing import Any

import httpx
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest, SendTaskHeartbeatResponse
from flwr.supercore.fab import Fab

from pathfed_client.transport.resident_runner import _answered, _beat
from pathfed_common.bundle import bundle_bytes, bundle_hash
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.protocol import wire

CONTEXT = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
MARK = "ran.txt"


def message() -> Message:
    return Message(RecordDict(), dst_node_id=2, message_type=wire.MESSAGE_TYPE)


def app(called: list[str]) -> ClientApp:
    made = ClientApp()

    def train(received: Message, context: Context) -> Message:
        del context
        called.append("called")
        return Message(RecordDict(), reply_to=received)

    made.train()(train)
    return made


def hostile_bundle() -> bytes:
    """A bundle whose module would leave a mark when it is unpacked and imported."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pyproject.toml", zipfile.ZipFile(io.BytesIO(bundle_bytes())).read("pyproject.toml"))
        archive.writestr("pathfed_client/__init__.py", f"open({MARK!r}, 'w').write('ran')")
    return buffer.getvalue()


def fab(data: bytes, name: str | None = None) -> Fab:
    return Fab(hashlib.sha256(data).hexdigest() if name is None else name, data, {})


def test_the_shipped_bundle_is_answered_by_the_installed_app():
    called: list[str] = []
    written: list[str] = []
    got = _answered(app(called), written.append, message(), CONTEXT, fab(bundle_bytes()))
    assert called == ["called"]
    assert not got.has_error()
    assert written == [], "the answerer writes down what it answers"


@pytest.mark.parametrize("bundle", [fab(hostile_bundle()), fab(hostile_bundle(), bundle_hash()), fab(bundle_bytes(), "0" * 64), fab(b"")])
def test_another_bundle_is_refused_and_nothing_of_it_runs(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called: list[str] = []
    written: list[str] = []
    got = _answered(app(called), written.append, message(), CONTEXT, bundle)
    assert (got.has_error(), got.error.reason) == (True, "PF404")
    assert written == ["PF404"], "written down before it leaves"
    assert called == []
    assert list(tmp_path.iterdir()) == []


def test_an_exceptions_text_stays_at_the_site(caplog):
    made = ClientApp()

    def train(received: Message, context: Context) -> Message:
        raise RuntimeError("Muellerova_biopsy.tif")

    made.train()(train)
    written: list[str] = []
    got = _answered(made, written.append, message(), CONTEXT, fab(bundle_bytes()))
    assert written == ["PF410"]
    assert (got.has_error(), got.error.reason) == (True, "PF410")
    assert "Muellerova" not in repr(got.error)
    assert "Muellerova" not in caplog.text
    assert "RuntimeError" in caplog.text


def test_a_refusal_that_cannot_be_written_down_does_not_leave():
    def full(code: str) -> None:
        raise HostError(ErrorCode.DISK_FULL, "the disk is full")

    with pytest.raises(HostError, match="PF901"):
        _answered(app([]), full, message(), CONTEXT, fab(b""))


class SuperNode:
    """What a heartbeat meets: an answer, or none."""

    def __init__(self, answer: bool | Exception) -> None:
        self.answer = answer

    def SendTaskHeartbeat(self, request: SendTaskHeartbeatRequest) -> SendTaskHeartbeatResponse:  # noqa: N802 - Flower's name
        if isinstance(self.answer, Exception):
            raise self.answer
        return SendTaskHeartbeatResponse(success=self.answer)


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        (True, True),
        (False, False),
        (httpx.ConnectError("away"), False),
        (httpx.HTTPStatusError("401", request=httpx.Request("POST", "http://a"), response=httpx.Response(401)), False),
    ],
)
def test_a_supernode_that_forgot_the_task_does_not_end_the_runner(answer, known):
    """Flower's own function would raise SIGINT, and the training would be lost with its charge."""
    client: Any = SuperNode(answer)
    assert _beat(client) is known
