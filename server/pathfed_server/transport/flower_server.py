"""Rounds over Flower's messages: the `SitePort` that the round loop talks through, and the ServerApp that Flower starts.

The loop is ours, not Flower's strategy: offers go to an explicit list of sites (a stock strategy takes every connected node), each with a
time to live near the round's deadline, and replies are pulled one by one. They are small: what is large has come over the bulk plane.

An offer can be lost with the process that held it: Flower never delivers a message twice. It is sent again, within the same deadline,

- where Flower answers in the site's place, because a runner or a SuperNode was killed (error replies that are no word of the site's), and
- where the site's SuperNode is back under another session than the one that was sent to.

A site that is asked again sends the bytes it has sealed, or goes on with the same release. The first reply counts.

What a site sends is its own to write: a reply that is no message of ours, or larger than any, costs the site its update (PF405), and the
loop nothing, neither memory nor its life.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode as FlowerErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid
from google.protobuf.message import DecodeError

from pathfed_common.errors import ErrorCode
from pathfed_common.ids import SiteName
from pathfed_common.protocol import wire
from pathfed_server.rounds.ports import Consent, Offer, Reply, Sending
from pathfed_server.rounds.uploads import arrived, transfer_seconds

RUN_KEY = "pathfed-run"
_POLL_S = 0.25
#: Replies pulled at the same time: memory stays that of so many updates.
_AT_ONCE = 2
#: Seconds after which a pull counts as stalled, and others may pull beside it. It holds no more in memory than what has arrived of it.
_STALL_S = 20.0
#: Seconds between two questions whether a site that is not connected may still be sent to, and whether one that was is in a new session.
_ASK_S = 2.0
#: Flower's own errors in a site's place: its process is gone, or its reply cannot be had.
_LOST = frozenset(
    {
        FlowerErrorCode.MESSAGE_UNAVAILABLE,
        FlowerErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        FlowerErrorCode.NODE_UNAVAILABLE,
        FlowerErrorCode.CLIENT_APP_CRASHED,
    }
)
_CODES = frozenset(code.value for code in ErrorCode)
#: Parts of a reply at most: Flower cuts ours into three. Each has at most the bytes that the fleet door passes (`path_filter.BODY_LIMIT`).
_MOST_PARTS = 8
_PULL_OBJECTS = "pull_objects"
#: What Flower raises where a message's bytes are none. What goes wrong with SuperLink or on the line, httpx raises.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, DecodeError, RecursionError)
_log = logging.getLogger(__name__)


class FlowerSites:
    """`SitePort` over Flower's grid.

    Args:
        grid: Flower's connection from the ServerApp to SuperLink.
        node_keys: Flower node key of each enrolled site, as SuperLink stores it. It ties a node to a site: a node whose key is not here
            gets no message.
    """

    def __init__(self, grid: Grid, node_keys: Mapping[SiteName, bytes]) -> None:
        self._grid = grid
        self._sites = {key: site for site, key in node_keys.items()}

    def exchange(self, offers: Sequence[Offer], spool: Path, *, withheld: Consent, sending: Sending) -> Iterator[Reply]:
        """Send offers, yield replies as they come; see `SitePort`."""
        outbox = _Outbox(offers)
        waiting = outbox.waiting
        deadline = max(offer.deadline for offer in offers)
        inbox = _Inbox(self._grid, spool)
        asked = time.monotonic()
        try:
            while (waiting or inbox.expected) and time.time() <= deadline:
                due = time.monotonic() - asked > _ASK_S
                for site, sent in self._send_to_online(outbox, inbox, withheld, sending) if waiting or due else ():
                    if isinstance(sent, Reply):
                        inbox.forget(site)
                        yield sent
                    else:
                        inbox.expect(site, sent)
                if due:
                    for reply in _withdrawn(waiting, withheld):
                        inbox.forget(reply.site)
                        yield reply
                    asked = time.monotonic()
                found = inbox.next(_POLL_S)
                if isinstance(found, Reply):
                    waiting.pop(found.site, None)
                    yield found
                elif found is not None:
                    outbox.again(found.site)
        finally:
            inbox.close()
        for site in {*inbox.expected, *waiting}:
            yield _without_update(site, ErrorCode.SITE_SILENT.value)

    def _send_to_online(
        self, outbox: "_Outbox", inbox: "_Inbox", withheld: Consent, sending: Sending
    ) -> Iterator[tuple[SiteName, str | Reply]]:
        """Send the offers of sites whose node is connected now and who consent, and note them as sent.

        With each site comes the id of the message, or the reply that says why none was sent.
        """
        for node in self._grid.get_nodes():
            site = self._sites.get(bytes(node.public_key))
            if site is None:
                continue
            if site in inbox.expected and outbox.session_of(site) != node.last_activated_at:
                outbox.again(site)
            if site not in outbox.waiting:
                continue
            code = withheld(site)
            if code is not None:
                del outbox.waiting[site]
                yield site, _without_update(site, code)
                continue
            sending(site)
            (message_id,) = self._grid.push_messages([_message(outbox.waiting[site], node.node_id)])
            if message_id:
                outbox.note_sent(site, node.last_activated_at)
                yield site, message_id


class _Outbox:
    """The offers of one exchange: those still to be sent, and the session of the SuperNode that each of the others was sent to.

    Attributes:
        waiting: by site, what is still to be sent.
    """

    def __init__(self, offers: Sequence[Offer]) -> None:
        self._offers = {offer.site: offer for offer in offers}
        self._sessions: dict[SiteName, str] = {}
        self.waiting = dict(self._offers)

    def session_of(self, site: SiteName) -> str:
        """The session that a site's offer was sent to: when it began, as SuperLink wrote it down."""
        return self._sessions[site]

    def note_sent(self, site: SiteName, session: str) -> None:
        """A site's offer was taken, for the SuperNode that connected in this session."""
        del self.waiting[site]
        self._sessions[site] = session

    def again(self, site: SiteName) -> None:
        """A site's offer may be lost: it is to be sent again."""
        self.waiting[site] = self._offers[site]


@dataclass(frozen=True)
class _Lost:
    """Flower's word that a message will not be answered."""

    site: SiteName
    message_id: str


def _withdrawn(waiting: dict[SiteName, Offer], withheld: Consent) -> Iterator[Reply]:
    """Take off `waiting` the sites that may be sent nothing any more: the node of one that was revoked does not come back."""
    for site in list(waiting):
        code = withheld(site)
        if code is not None:
            del waiting[site]
            yield _without_update(site, code)


class _Inbox:
    """Collects the replies of one exchange, a thread for each.

    Flower's pull blocks until a reply's upload is complete, and for three minutes when the upload broke off: the thread that waits so is
    left behind at the deadline, and writes nothing any more. `_AT_ONCE` bounds the replies in memory; a pull that has not ended after
    `_STALL_S` seconds gives up its place, so that stalled uploads hold up nobody else.
    """

    def __init__(self, grid: Grid, incoming: Path) -> None:
        self._grid = grid
        self._incoming = incoming
        self._places = threading.Semaphore(_AT_ONCE)
        self._lock = threading.Lock()
        #: Messages whose replies are being pulled, and since when (monotonic seconds).
        self._pulling: dict[str, float] = {}
        self._closed = threading.Event()
        self._found: queue.SimpleQueue[Reply | _Lost | Exception] = queue.SimpleQueue()
        #: Sites whose answer has come, or is not awaited any more: nothing else of theirs is written.
        self._done: set[SiteName] = set()
        #: The message sent last to each site that has not answered.
        self._messages: dict[SiteName, str] = {}

    @property
    def expected(self) -> frozenset[SiteName]:
        """Sites that were sent an offer and have not answered."""
        return frozenset(self._messages)

    def expect(self, site: SiteName, message_id: str) -> None:
        """Begin to collect a site's reply to one more message; whichever reply comes first counts."""
        self._messages[site] = message_id
        threading.Thread(target=self._collect, args=(site, message_id), name=f"reply of {site}", daemon=True).start()

    def forget(self, site: SiteName) -> None:
        """Await nothing of a site any more."""
        with self._lock:
            self._done.add(site)
        self._messages.pop(site, None)

    def next(self, within_s: float) -> Reply | _Lost | None:
        """The next reply, the news that a site's last message is lost, or None when neither came in time."""
        self._free_stalled_places()
        try:
            found = self._found.get(timeout=within_s)
        except queue.Empty:
            return None
        if isinstance(found, Exception):
            raise found
        if isinstance(found, _Lost) and self._messages.get(found.site) != found.message_id:
            return None  # another was sent since
        if found.site not in self._messages:
            return None
        del self._messages[found.site]
        return found

    def close(self) -> None:
        """Collect no more."""
        self._closed.set()

    def _collect(self, site: SiteName, message_id: str) -> None:
        try:
            while not self._closed.is_set() and site not in self._done:
                with self._place(message_id):
                    found = self._look(site, message_id)
                if found is not None:
                    self._found.put(found)
                    return
                self._closed.wait(_POLL_S)
        except Exception as error:  # handed over: `next` raises it in the loop's thread
            self._found.put(error)

    @contextmanager
    def _place(self, message_id: str) -> Iterator[None]:
        self._places.acquire()
        with self._lock:
            self._pulling[message_id] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                if self._pulling.pop(message_id, None) is not None:
                    self._places.release()

    def _free_stalled_places(self) -> None:
        now = time.monotonic()
        with self._lock:
            for message_id in [each for each, since in self._pulling.items() if now - since > _STALL_S]:
                del self._pulling[message_id]
                self._places.release()

    def _look(self, site: SiteName, message_id: str) -> Reply | _Lost | None:
        try:
            messages = list(self._grid.pull_messages([message_id])) if not self._closed.is_set() else []
            if not messages or self._closed.is_set():
                return None
            if _is_lost(messages[0]):
                return _Lost(site, message_id)
            said = _said(messages[0])
        except httpx.TransportError:
            return None  # SuperLink is away; the daemon brings it back
        except _UNREADABLE as error:
            _log.warning("%s: the reply cannot be read: %s", site, type(error).__name__)
            said = ErrorCode.MESSAGE_MALFORMED.value
        return _reply(site, said, self._incoming) if self._claim(site) else None

    def _claim(self, site: SiteName) -> bool:
        """Whether this is a site's first reply. A later one must not be written: the first one's file may be under examination."""
        with self._lock:
            first = site not in self._done
            self._done.add(site)
        return first


def make_app(main: Callable[[str, int, Grid], None]) -> ServerApp:
    """Flower's ServerApp around our own main: `main(run name, Flower's number of its own run, grid)`."""
    app = ServerApp()
    bound_replies()

    def serve(grid: Grid, context: Context) -> None:
        main(str(context.run_config[RUN_KEY]), context.run_id, grid)

    app.main()(serve)
    return app


def bound_replies() -> None:
    """Let Flower's grid pull no message of more than `_MOST_PARTS` parts: it would hold in memory all that a site has sent. Once is enough.

    Raises:
        RuntimeError: Flower pulls in another way than the pinned version.
    """
    pull = getattr(http_grid, _PULL_OBJECTS, None)
    if pull is None:
        raise RuntimeError("flwr no longer pulls a message's parts by http_grid.pull_objects: look again before raising the pin")
    if not hasattr(pull, "__wrapped__"):
        setattr(http_grid, _PULL_OBJECTS, _bounded(pull))


def _bounded(pull: Callable[..., dict[str, bytes]]) -> Callable[..., dict[str, bytes]]:
    @wraps(pull)
    def pull_few(object_ids: list[str], *given: Any, **more: Any) -> dict[str, bytes]:
        if len(object_ids) > _MOST_PARTS:
            raise ValueError(f"a message of {len(object_ids)} parts")
        return pull(object_ids, *given, **more)

    return pull_few


def _message(offer: Offer, node_id: int) -> Message:
    content = RecordDict({wire.OFFER: ConfigRecord({wire.ENVELOPE: offer.envelope})})
    return Message(content, dst_node_id=node_id, message_type=wire.MESSAGE_TYPE, ttl=max(1.0, offer.deadline - time.time()))


def _is_lost(message: Message) -> bool:
    return message.has_error() and message.error.code in _LOST and message.error.reason not in _CODES


def _said(message: Message) -> bytes | str:
    """The statement that a reply holds, or a code: its own, or what is said of a reply that holds neither. Raises any of `_UNREADABLE`."""
    if message.has_error():
        reason = message.error.reason or ""
        return reason if reason in _CODES else ErrorCode.SITE_SILENT.value
    record = message.content.config_records[wire.REPLY]
    code, envelope = record[wire.CODE], record[wire.ENVELOPE]
    if code or not isinstance(envelope, bytes):
        return str(code) if code in _CODES else ErrorCode.MESSAGE_MALFORMED.value
    return envelope


def _reply(site: SiteName, said: bytes | str, incoming: Path) -> Reply:
    """What a site has said. With a statement goes the update that has arrived over the bulk plane before."""
    if isinstance(said, str):
        return _without_update(site, said)
    update, now = arrived(incoming, site), time.time()
    if not update.is_file():
        return _without_update(site, ErrorCode.UPDATE_ABSENT.value)
    return Reply(site=site, code=None, statement=said, update=update, received_at=now, transfer_s=transfer_seconds(incoming, site))


def _without_update(site: SiteName, code: str) -> Reply:
    return Reply(site=site, code=code, statement=None, update=None, received_at=time.time(), transfer_s=0.0)
