"""A resident runner: takes Flower's ClientApp tasks from the SuperNode and answers them with the installed app.

Flower starts a fresh process for every message and puts the bundle's folder first on sys.path, where it could shadow installed code. The
runner does neither: it uses Flower's own runtime client and message functions, never unpacks a bundle, refuses any whose digest is not the
one this version ships, and stays warm between rounds. These are private functions of Flower; flwr is pinned exactly, and
tests/client/transport/test_flower_contract.py fails when they move.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode as FlowerErrorCode
from flwr.common.constant import SubStatus
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullAppMessagesResponse, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from pathfed_client.gate.ports import Refusals
from pathfed_client.transport.heartbeat import beat_often
from pathfed_common.bundle import bundle_hash
from pathfed_common.errors import ErrorCode, HostError

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_POLL_S = 0.25
_AWAY_S = 1.0
#: Seconds within which a part of a message, 5 MB at most, must follow the one before: a line of 0.4 Mbit/s is fast enough.
_OBJECT_WITHIN_S = 100.0
_log = logging.getLogger(__name__)


def run(address: str, secret_file: Path, app: ClientApp, refusals: Refusals, *, running: Callable[[], bool] = lambda: True) -> None:
    """Take and answer tasks from the SuperNode at `address` (loopback HOST:PORT) for as long as `running()` holds.

    A SuperNode that is away is waited for: its supervisor brings it back. `refusals` is told of a code that leaves in the app's place.
    """
    beat_often()
    poller = _client(address, SuperExecAuthHttpInterceptor(master_secret=secret_file.read_bytes(), protected_methods=_ACQUIRE))
    while running():
        try:
            task = poller.AcquireTask(AcquireTaskRequest(supported_task_types={TaskType.CLIENT_APP}))
        except httpx.HTTPError as error:
            _log.info("the SuperNode does not answer yet: %s", type(error).__name__)
            time.sleep(_AWAY_S)
            continue
        if not (task.HasField("task") and task.token):
            time.sleep(_POLL_S)
            continue
        try:
            _serve(_client(address, RuntimeTokenHttpInterceptor(task.token)), app, refusals)
        except HostError as error:
            _log.error("%s %s: the task is left unanswered", error.code.value, error.what)
        except (httpx.HTTPError, ObjectPushError, ObjectPullError, RuntimeError) as error:
            _log.warning("a task was lost with its SuperNode: %s", type(error).__name__)


def _serve(client: RuntimeHttpClient, app: ClientApp, refusals: Refusals) -> None:
    heartbeat = HeartbeatSender(lambda: _beat(client))
    heartbeat.start()
    try:
        message, context, _, bundle = pull_task_input(cast(RuntimeHttpClient, _Impatient(client, _OBJECT_WITHIN_S)))
        reply = _answered(app, refusals, message, context, bundle)
        push_message(client, reply, context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
    finally:
        heartbeat.stop()
        client.close()


def _beat(client: RuntimeHttpClient) -> bool:
    """Tell the SuperNode that its task is worked on; whether it knows the task.

    Flower's own function ends the process where it does not. But a SuperNode that was started again knows no task of before, and what is
    being trained is charged: it is sealed all the same, and sent when the round is offered again.
    """
    try:
        return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
    except httpx.HTTPError:
        return False


class _Impatient:
    """A task's client that gives its message up when it has expired, or when no part of it comes any more.

    A server that dies between announcing a message and delivering it leaves parts that never come, and Flower waits for them for
    ever: the site would be silent for good, while its SuperNode is connected and takes further messages.
    """

    def __init__(self, client: RuntimeHttpClient, within_s: float) -> None:
        self._client = client
        self._within_s = within_s
        self._last = time.monotonic()
        self._expires = math.inf

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        """As the client's; notes how long the message is worth waiting for: its time to live, which ends with the round."""
        response = self._client.PullMessages(request)
        lives = [message.metadata.ttl for message in response.messages_list]
        self._expires = time.monotonic() + max(lives, default=math.inf)
        return response

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802 - Flower's name
        """As the client's.

        Raises:
            ObjectPullError: no part came for the time allowed, or the message has expired.
        """
        response = self._client.PullObject(request)
        now = time.monotonic()
        if response.object_available:
            self._last = now
        elif now - self._last > self._within_s or now > self._expires:
            raise ObjectPullError(request.object_id, "the rest of the message does not come")
        return response


def _answered(app: ClientApp, refusals: Refusals, message: Message, context: Context, bundle: Fab) -> Message:
    """The installed app's answer, or a refusal of a bundle that is not ours."""
    if hashlib.sha256(bundle.content).hexdigest() != bundle_hash() or bundle.hash_str != bundle_hash():
        _log.error("refused a bundle with digest %s, expected %s", bundle.hash_str[:12], bundle_hash()[:12])
        refusals(ErrorCode.BUNDLE_REFUSED.value)
        return Message(Error(code=FlowerErrorCode.INVALID_FAB, reason=ErrorCode.BUNDLE_REFUSED.value), reply_to=message)
    try:
        return app(message, context)
    except Exception as error:
        # The edge of the process: an exception's text must not leave the site (Flower would send it), so a code does. Nor is it logged.
        _log.error("the site's app failed: %s", type(error).__name__)
        refusals(ErrorCode.SITE_INTERNAL.value)
        return Message(Error(code=FlowerErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=ErrorCode.SITE_INTERNAL.value), reply_to=message)


def _client(address: str, interceptor: RuntimeTokenHttpInterceptor | SuperExecAuthHttpInterceptor) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), interceptor],
        retry_invoker=make_simple_http_retry_invoker(),
    )
