"""What the resident runner takes from Flower's insides. Look here first when flwr's pin moves. The whole way is in tests/end_to_end."""

import hashlib
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, message_from_proto, message_to_proto, run_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PullAppMessagesResponse,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    PushTaskOutputRequest,
    PushTaskOutputResponse,
    SendTaskHeartbeatResponse,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime import run_clientapp
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from pathfed_client.transport import resident_runner
from pathfed_common.bundle import bundle_bytes, bundle_hash
from pathfed_common.protocol import wire

NODE, RUN, TASK = 2, 1, 3


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (pull_task_input, ["client"]),
        (push_message, ["client", "message", "context"]),
        (push_task_output, ["client", "context", "sub_status", "details"]),
        (RuntimeHttpClient.SendTaskHeartbeat, ["self", "request"]),
        (HeartbeatSender, ["heartbeat_fn"]),
        (RuntimeTokenHttpInterceptor, ["token"]),
        (RuntimeVersionHttpInterceptor, ["component_name"]),
        (SuperExecAuthHttpInterceptor, ["master_secret", "protected_methods"]),
        (make_simple_http_retry_invoker, []),
        (RuntimeHttpClient.AcquireTask, ["self", "request"]),
        (RuntimeHttpClient.close, ["self"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_flowers_private_functions_take_what_the_runner_gives(function: Callable[..., Any], parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_flowers_client_is_made_from_what_the_runner_gives() -> None:
    wanted = {"server_address", "insecure", "root_certificates", "interceptors", "retry_invoker"}
    assert wanted <= set(inspect.signature(RuntimeHttpClient.from_server_address).parameters)
    resident_runner._client("127.0.0.1:1", RuntimeTokenHttpInterceptor("token")).close()


def test_flower_still_acquires_tasks_by_the_method_that_the_secret_protects() -> None:
    assert frozenset({"/flwr.proto.Runtime/AcquireTask"}) == resident_runner._ACQUIRE
    assert "AcquireTask" in inspect.getsource(RuntimeHttpClient.AcquireTask)
    request = AcquireTaskRequest(supported_task_types={TaskType.CLIENT_APP})
    assert list(request.supported_task_types) == [TaskType.CLIENT_APP]
    assert {"task", "token"} <= {field.name for field in AcquireTaskResponse.DESCRIPTOR.fields}


def test_flowers_own_process_still_answers_a_task_in_the_order_that_the_runner_does() -> None:
    """Input, the app, the message, then the output with its state."""
    source = inspect.getsource(run_clientapp.run_clientapp)
    places = [source.index(call) for call in ("pull_task_input(", "client_app(", "push_message(")]
    assert places == sorted(places)


class Runtime:
    """A SuperNode's runtime API with one task, in this process: Flower's messages on the wire, nothing between."""

    def __init__(self, bundle: bytes) -> None:
        self.message = Message(
            RecordDict({wire.OFFER: ConfigRecord({wire.ENVELOPE: b"offer"})}), dst_node_id=NODE, message_type=wire.MESSAGE_TYPE
        )
        self.bundle = bundle
        self.objects = {name: item.deflate() for name, item in get_all_nested_objects(self.message).items()}
        self.confirmed: list[str] = []
        self.pushed: PushAppMessagesRequest | None = None
        self.received: dict[str, bytes] = {}
        self.output: PushTaskOutputRequest | None = None
        self.beating = threading.Event()
        self.closed = False

    def PullTaskInput(self, request: object) -> PullTaskInputResponse:  # noqa: N802 - Flower's names
        context = Context(run_id=RUN, node_id=NODE, node_config={}, state=RecordDict(), run_config={})
        fab = Fab(hashlib.sha256(self.bundle).hexdigest(), self.bundle, {})
        return PullTaskInputResponse(
            context=context_to_proto(context), run=run_to_proto(Run.create_empty(RUN)), fab=fab_to_proto(fab), task_id=TASK
        )

    def PullMessages(self, request: object) -> PullAppMessagesResponse:  # noqa: N802
        return PullAppMessagesResponse(messages_list=[message_to_proto(self.message)], message_object_trees=[get_object_tree(self.message)])

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        return PullObjectResponse(object_found=True, object_available=True, object_content=self.objects[request.object_id])

    def ConfirmMessageReceived(self, request: Any) -> ConfirmMessageReceivedResponse:  # noqa: N802
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()

    def PushMessages(self, request: PushAppMessagesRequest) -> PushAppMessagesResponse:  # noqa: N802
        self.pushed = request
        tree = request.message_object_trees[0]
        return PushAppMessagesResponse(objects_to_push=_ids(tree), session_id="session")

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:  # noqa: N802
        self.received[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def PushTaskOutput(self, request: PushTaskOutputRequest) -> PushTaskOutputResponse:  # noqa: N802
        self.output = request
        return PushTaskOutputResponse()

    def SendTaskHeartbeat(self, request: object) -> SendTaskHeartbeatResponse:  # noqa: N802
        self.beating.set()
        return SendTaskHeartbeatResponse(success=True)

    def close(self) -> None:
        self.closed = True


def _ids(tree: Any) -> list[str]:
    return [tree.object_id, *(name for child in tree.children for name in _ids(child))]


def app() -> ClientApp:
    made = ClientApp()

    def train(received: Message, context: Context) -> Message:
        envelope = received.content.config_records[wire.OFFER][wire.ENVELOPE]
        assert (envelope, context.node_id) == (b"offer", NODE)
        return Message(RecordDict({wire.REPLY: ConfigRecord({wire.CODE: "", wire.ENVELOPE: b"signed"})}), reply_to=received)

    made.train()(train)
    return made


def test_one_task_goes_from_the_offer_to_the_answer_through_flowers_own_functions() -> None:
    assert hashlib.sha256(bundle_bytes()).hexdigest() == bundle_hash()
    runtime = Runtime(bundle_bytes())
    resident_runner._serve(runtime, app(), [].append)  # type: ignore[arg-type]
    assert runtime.confirmed == [runtime.message.object_id]
    assert runtime.pushed is not None
    reply = message_from_proto(runtime.pushed.messages_list[0])
    assert reply.metadata.reply_to_message_id == runtime.message.object_id
    content = inflate_object_from_contents(runtime.pushed.message_object_trees[0].object_id, runtime.received)
    assert isinstance(content, Message)
    assert content.content.config_records[wire.REPLY][wire.ENVELOPE] == b"signed"
    assert runtime.output is not None
    assert context_from_proto(runtime.output.context).node_id == NODE
    assert runtime.beating.is_set()
    assert runtime.closed


def test_a_task_with_another_bundle_is_answered_with_a_code_and_ends_like_any_other() -> None:
    runtime = Runtime(b"another")
    resident_runner._serve(runtime, app(), [].append)  # type: ignore[arg-type]
    assert runtime.pushed is not None
    assert message_from_proto(runtime.pushed.messages_list[0]).error.reason == "PF404"
    assert runtime.output is not None
    assert runtime.closed


class Withholding(Runtime):
    """Announces a message and delivers some parts of it only, as a SuperLink does that was killed in between."""

    def __init__(self, bundle: bytes, parts: int) -> None:
        super().__init__(bundle)
        self.left = parts

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        if self.left == 0:
            return PullObjectResponse(object_found=True, object_available=False)
        self.left -= 1
        return super().PullObject(request)


def test_a_message_that_expired_is_not_waited_for() -> None:
    runtime = Withholding(bundle_bytes(), 1)
    runtime.message.metadata.ttl = 0.5
    with pytest.raises(ObjectPullError):
        resident_runner._serve(runtime, app(), [].append)  # type: ignore[arg-type]
    assert runtime.closed


@pytest.mark.parametrize("parts", [0, 2])
def test_a_message_whose_parts_stop_coming_is_given_up_and_the_runner_takes_the_next(monkeypatch, parts) -> None:
    monkeypatch.setattr(resident_runner, "_OBJECT_WITHIN_S", 0.5)
    runtime = Withholding(bundle_bytes(), parts)
    with pytest.raises(ObjectPullError):
        resident_runner._serve(runtime, app(), [].append)  # type: ignore[arg-type]
    assert runtime.pushed is None
    assert runtime.closed
