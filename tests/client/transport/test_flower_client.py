"""Real Flower messages in and out of the site's ClientApp."""

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from pathfed_client.gate.ports import Answer
from pathfed_client.transport.flower_client import make_app
from pathfed_common.protocol import wire

CONTEXT = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def message(content: RecordDict) -> Message:
    return Message(content, dst_node_id=2, message_type=wire.MESSAGE_TYPE)


def offer() -> RecordDict:
    return RecordDict({wire.OFFER: ConfigRecord({wire.ENVELOPE: b"envelope"})})


def never_refused(code: str) -> None:
    raise AssertionError(code)


def reply(answer: Answer, content: RecordDict | None = None) -> RecordDict:
    app = make_app(lambda envelope: answer, never_refused)
    return app(message(content or offer()), CONTEXT).content


def test_an_offer_is_handed_on_and_the_answer_packed():
    asked = []

    def answer(envelope: bytes) -> Answer:
        asked.append(envelope)
        return Answer(code=None, statement=b"statement")

    sent = message(offer())
    got = make_app(answer, never_refused)(sent, CONTEXT)
    assert asked == [b"envelope"]
    assert dict(got.content.config_records[wire.REPLY]) == {wire.CODE: "", wire.ENVELOPE: b"statement"}
    assert len(got.content) == 1, "a statement, and no update"
    assert got.metadata.reply_to_message_id == sent.metadata.message_id
    assert len(CONTEXT.state) == 0


def test_a_refusal_is_a_code_and_nothing_else():
    content = reply(Answer(code="PF407"))
    assert dict(content.config_records[wire.REPLY]) == {wire.CODE: "PF407", wire.ENVELOPE: b""}
    assert len(content) == 1


def test_half_an_answer_is_none():
    assert dict(reply(Answer(code=None)).config_records[wire.REPLY]) == {wire.CODE: "PF410", wire.ENVELOPE: b""}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({wire.OFFER: ConfigRecord({})}),
        RecordDict({wire.OFFER: ConfigRecord({wire.ENVELOPE: "text"})}),
        RecordDict({wire.OFFER: ArrayRecord()}),
        RecordDict({wire.REPLY: ConfigRecord({wire.ENVELOPE: b"e"})}),
    ],
)
def test_another_message_is_malformed_and_asks_nothing(content):
    def never(envelope: bytes) -> Answer:
        raise AssertionError("asked")

    written: list[str] = []
    got = make_app(never, written.append)(message(content), CONTEXT)
    assert dict(got.content.config_records[wire.REPLY]) == {wire.CODE: "PF405", wire.ENVELOPE: b""}
    assert written == ["PF405"], "written down before it leaves"
