"""Offers and replies over a grid of this process, with Flower's own messages. The whole way is in tests/end_to_end."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid
from google.protobuf.message import DecodeError

from pathfed_common.ids import SiteName
from pathfed_common.protocol import wire
from pathfed_server.rounds.ports import Consent, Offer, Reply
from pathfed_server.rounds.uploads import arrived
from pathfed_server.transport import flower_server
from pathfed_server.transport.flower_server import FlowerSites

UPDATE = b"u" * 1000
#: Longer than any of these exchanges takes when it works.
LONG_S = 60.0
Answering = Callable[[Message], Message | None]


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower's messages take their run and sender from the task of their process."""
    for name, value in {"_task_id": 3, "_run_id": 1, "_node_id": 2}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


class LocalGrid:
    """What `FlowerSites` uses of Flower's grid. Each site answers by a function; None: not yet."""

    def __init__(self, answers: dict[str, Answering]) -> None:
        self.answers = answers
        self.online = list(answers)
        self.sent: list[tuple[str, Message]] = []
        self.refuse_pushes = 0
        self.sessions: dict[str, str] = {}

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(node_id=number, public_key=key(name), last_activated_at=self.sessions.get(name, "first"))
            for number, name in enumerate(self.answers, 1)
            if name in self.online
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        if self.refuse_pushes:
            self.refuse_pushes -= 1
            return [""]
        (message,) = messages
        self.sent.append((list(self.answers)[message.metadata.dst_node_id - 1], message))
        return [str(len(self.sent) - 1)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        name, message = self.sent[int(message_id)]
        reply = self.answers[name](message)
        return [] if reply is None else [reply]


def key(name: str) -> bytes:
    return f"key of {name}".encode()


def content(code: Any = "", envelope: Any = b"signed") -> RecordDict:
    return RecordDict({wire.REPLY: ConfigRecord({wire.CODE: code, wire.ENVELOPE: envelope})})


def answered(message: Message) -> Message:
    return Message(content(), reply_to=message)


def never(message: Message) -> None:
    return None


@pytest.fixture
def exchange(tmp_path):
    """Offer a round to sites, whose updates have arrived unless they are `without`; the replies by site."""
    spool = tmp_path / "spool"
    spool.mkdir()

    def call(
        grid: Any,
        asked: Iterable[str],
        enrolled: Iterable[str] | None = None,
        within_s: float = LONG_S,
        withheld: Consent = lambda site: None,
        without: Iterable[str] = (),
    ) -> dict[str, Reply]:
        for name in set(grid.answers) - set(without):
            (spool / f"{name}.manifest").write_bytes(b"announced")
            arrived(spool, SiteName(name)).write_bytes(UPDATE)
        deadline = time.time() + within_s
        offers = [Offer(site=SiteName(name), envelope=f"offer to {name}".encode(), deadline=deadline) for name in asked]
        keys = {SiteName(name): key(name) for name in (enrolled or grid.answers)}
        announced: list[SiteName] = []
        replies = list(FlowerSites(grid, keys).exchange(offers, spool, withheld=withheld, sending=announced.append))
        assert set(announced) == {name for name, _ in grid.sent}, "each is announced before it is sent, and no other"
        assert len({reply.site for reply in replies}) == len(replies), "one reply a site"
        return {reply.site: reply for reply in replies}

    return call


def test_each_site_gets_its_own_offer_and_nothing_else_and_its_update_is_the_one_that_arrived(exchange):
    grid = LocalGrid({"site-a": answered, "site-b": answered})
    replies = exchange(grid, ["site-a", "site-b"])
    for name, message in grid.sent:
        assert message.content.config_records[wire.OFFER][wire.ENVELOPE] == f"offer to {name}".encode()
        assert len(message.content) == 1
        assert message.metadata.message_type == wire.MESSAGE_TYPE
        assert LONG_S - 20 < message.metadata.ttl <= LONG_S
    assert sorted(replies) == ["site-a", "site-b"]
    for reply in replies.values():
        assert (reply.code, reply.statement) == (None, b"signed")
        assert reply.update is not None
        assert reply.update.read_bytes() == UPDATE
        assert reply.transfer_s >= 0


def test_no_message_reaches_a_site_whose_consent_is_gone_when_its_node_is_found(exchange):
    """Asked at the moment of sending, not when the round was opened: a site may be offline for an hour and revoke meanwhile."""
    grid = LocalGrid({"site-a": answered, "site-b": answered})
    grid.online = ["site-a"]
    revoked: set[str] = set()

    def withheld(site: SiteName) -> str | None:
        if site == "site-a":  # while site-b is still away, it revokes; then its node connects
            revoked.add("site-b")
            grid.online = ["site-a", "site-b"]
        return "PF530" if site in revoked else None

    replies = exchange(grid, ["site-a", "site-b"], withheld=withheld)
    assert [name for name, _ in grid.sent] == ["site-a"]
    assert (replies["site-a"].code, replies["site-b"].code, replies["site-b"].update) == (None, "PF530", None)


def test_nodes_of_sites_that_are_not_asked_or_not_enrolled_get_nothing(exchange):
    grid = LocalGrid({"asked": answered, "enrolled": answered, "stranger": answered})
    assert sorted(exchange(grid, ["asked"], enrolled=["asked", "enrolled"])) == ["asked"]
    assert [name for name, _ in grid.sent] == ["asked"]


def test_a_site_that_comes_online_later_gets_its_offer_then(exchange):
    grid = LocalGrid({"early": answered, "late": answered})
    grid.online = ["early"]

    def early(message: Message) -> Message:
        grid.online.append("late")
        return answered(message)

    grid.answers["early"] = early
    assert {name: reply.code for name, reply in exchange(grid, ["early", "late"]).items()} == {"early": None, "late": None}


def test_an_offer_that_superlink_did_not_take_is_sent_again(exchange):
    grid = LocalGrid({"site-a": answered})
    grid.refuse_pushes = 2
    assert exchange(grid, ["site-a"])["site-a"].code is None


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (lambda message: Message(content(code="PF302", envelope=b""), reply_to=message), "PF302"),
        (lambda message: Message(content(code="Muellerova.tif", envelope=b""), reply_to=message), "PF405"),
        (lambda message: Message(content(envelope="text"), reply_to=message), "PF405"),
        (lambda message: Message(content(code=["PF301", "PF302"], envelope=b""), reply_to=message), "PF405"),
        (lambda message: Message(content(code=b"PF301"), reply_to=message), "PF405"),
        (lambda message: Message(RecordDict(), reply_to=message), "PF405"),
        (lambda message: Message(Error(code=1, reason="PF404"), reply_to=message), "PF404"),
        (lambda message: Message(Error(code=1, reason="a text of Flower's"), reply_to=message), "PF515"),
        (lambda message: Message(Error(code=1), reply_to=message), "PF515"),
    ],
)
def test_what_is_no_statement_becomes_a_code_and_no_file(exchange, reply, code):
    got = exchange(LocalGrid({"site-a": reply}), ["site-a"])["site-a"]
    assert (got.code, got.statement, got.update) == (code, None, None)


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError, DecodeError, RecursionError])
def test_a_reply_that_cannot_be_read_costs_its_site_alone(exchange, error):
    """What Flower raises for bytes that are no message. Whatever a site sends, the loop goes on with the others."""

    def unreadable(message: Message) -> Message:
        raise error("utf-8", b"", 0, 1, "no text") if error is UnicodeDecodeError else error("no message")

    replies = exchange(LocalGrid({"site-a": unreadable, "site-b": answered}), ["site-a", "site-b"])
    assert (replies["site-a"].code, replies["site-a"].update) == ("PF405", None)
    assert replies["site-b"].code is None


def test_a_message_of_many_parts_is_not_pulled_at_all(monkeypatch):
    pulled: list[str] = []
    monkeypatch.setattr(http_grid, "pull_objects", lambda object_ids, **more: pulled.extend(object_ids))
    flower_server.bound_replies()
    flower_server.bound_replies()
    pull: Any = vars(http_grid)["pull_objects"]
    pull(object_ids=["message", "records", "record"], pull_object_fn=bytes)
    with pytest.raises(ValueError, match="9 parts"):
        pull(object_ids=list("012345678"), pull_object_fn=bytes)
    assert pulled == ["message", "records", "record"]


def test_a_reply_of_ours_has_three_parts():
    reply = Message(content(), reply_to=Message(content(), dst_node_id=1, message_type=wire.MESSAGE_TYPE))
    assert len(list(iterate_object_tree(get_object_tree(reply)))) == 3


def test_a_statement_whose_update_is_not_here_whole_is_refused_with_a_code(exchange, tmp_path):
    grid = LocalGrid({"site-a": answered, "site-b": answered})
    (tmp_path / "spool" / "site-a.part").write_bytes(UPDATE[:10])
    replies = exchange(grid, ["site-a", "site-b"], without=["site-a"])
    assert (replies["site-a"].code, replies["site-a"].update) == ("PF464", None)
    assert replies["site-b"].code is None


def test_sites_that_are_away_or_silent_are_told_at_the_deadline(exchange):
    grid = LocalGrid({"away": answered, "silent": never, "site-a": answered})
    grid.online.remove("away")
    replies = exchange(grid, ["away", "silent", "site-a"], within_s=6)
    assert {name: reply.code for name, reply in replies.items()} == {"away": "PF515", "silent": "PF515", "site-a": None}


def test_a_superlink_that_is_away_for_a_moment_is_asked_again(exchange):
    away = [httpx.ConnectError("away"), httpx.ReadTimeout("away")]

    def answer(message: Message) -> Message:
        if away:
            raise away.pop()
        return answered(message)

    assert exchange(LocalGrid({"site-a": answer}), ["site-a"])["site-a"].code is None


def test_an_error_while_a_reply_is_pulled_ends_the_exchange(exchange):
    def broken(message: Message) -> Message:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        exchange(LocalGrid({"site-a": broken}), ["site-a"])


def test_stalled_replies_hold_up_nobody_else(exchange, monkeypatch):
    """More of them than are pulled at once."""
    monkeypatch.setattr(flower_server, "_STALL_S", 0.2)
    go_on, stalling = threading.Event(), []
    stalled_sites = [f"stalled-{number}" for number in range(flower_server._AT_ONCE + 1)]

    def stalled(message: Message) -> Message:
        stalling.append(message)
        go_on.wait(LONG_S)
        return answered(message)

    def prompt(message: Message) -> Message | None:
        """Answers when every place is, or was, held by a stalled upload."""
        return answered(message) if len(stalling) >= flower_server._AT_ONCE else None

    grid = LocalGrid({**dict.fromkeys(stalled_sites, stalled), "prompt": prompt})
    replies = exchange(grid, [*stalled_sites, "prompt"], within_s=15)
    assert replies["prompt"].code is None
    assert {replies[name].code for name in stalled_sites} == {"PF515"}
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("reply of stalled"):
            thread.join(LONG_S)


def test_a_site_revoked_while_it_is_away_holds_nobody_to_the_deadline(exchange, monkeypatch):
    monkeypatch.setattr(flower_server, "_ASK_S", 0.1)
    grid = LocalGrid({"site-a": answered, "site-b": answered})
    grid.online = ["site-a"]
    begun, asked = time.monotonic(), []

    def withheld(site: SiteName) -> str | None:
        asked.append(site)
        return "PF518" if site == "site-b" and asked.count(site) > 1 else None

    replies = exchange(grid, ["site-a", "site-b"], withheld=withheld)
    assert (replies["site-a"].code, replies["site-b"].code) == (None, "PF518")
    assert time.monotonic() - begun < LONG_S / 2


@pytest.mark.parametrize("error", sorted(flower_server._LOST))
def test_an_offer_that_flower_answers_in_the_sites_place_is_sent_again(exchange, error):
    def killed_once(message: Message) -> Message:
        return Message(Error(code=error, reason="a text of Flower's"), reply_to=message) if len(grid.sent) == 1 else answered(message)

    grid = LocalGrid({"site-a": killed_once})
    assert exchange(grid, ["site-a"])["site-a"].code is None
    assert [message.content.config_records[wire.OFFER][wire.ENVELOPE] for _, message in grid.sent] == [b"offer to site-a"] * 2


def test_an_offer_lost_with_its_supernode_is_sent_to_the_next_session(exchange, monkeypatch):
    monkeypatch.setattr(flower_server, "_ASK_S", 0.1)

    def lost_once(message: Message) -> Message | None:
        if message is grid.sent[0][1]:
            grid.sessions["site-a"] = "second"
            return None
        return answered(message)

    grid = LocalGrid({"site-a": lost_once})
    begun = time.monotonic()
    assert exchange(grid, ["site-a"])["site-a"].code is None
    assert len(grid.sent) == 2
    assert time.monotonic() - begun < LONG_S / 2


def test_a_site_at_work_is_not_asked_twice(exchange, monkeypatch):
    monkeypatch.setattr(flower_server, "_ASK_S", 0.01)
    looks = []

    def slow(message: Message) -> Message | None:
        looks.append(message)
        return answered(message) if len(looks) > 5 else None

    grid = LocalGrid({"site-a": slow})
    assert exchange(grid, ["site-a"])["site-a"].code is None
    assert len(grid.sent) == 1


def test_the_first_of_two_replies_counts(exchange, monkeypatch):
    monkeypatch.setattr(flower_server, "_ASK_S", 0.1)
    go_on = threading.Event()

    def twice(message: Message) -> Message | None:
        if message is grid.sent[0][1]:
            grid.sessions["site-a"] = "second"
            if len(grid.sent) == 1:
                return None
            go_on.wait(LONG_S)  # pulled while the other is written
            return Message(content(envelope=b"other"), reply_to=message)
        return answered(message)

    grid = LocalGrid({"site-a": twice})
    reply = exchange(grid, ["site-a"])["site-a"]
    go_on.set()
    assert (reply.code, reply.statement) == (None, b"signed")


def test_a_site_revoked_while_its_offer_is_lost_is_told_once(exchange, monkeypatch):
    monkeypatch.setattr(flower_server, "_ASK_S", 0.1)
    lost = lambda message: Message(Error(code=5, reason="a text of Flower's"), reply_to=message)  # noqa: E731
    grid = LocalGrid({"site-a": lost})
    replies = exchange(grid, ["site-a"], withheld=lambda site: "PF518" if grid.sent else None)
    assert replies["site-a"].code == "PF518"
    assert len(grid.sent) == 1
