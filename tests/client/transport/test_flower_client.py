"""Real Flower messages in and out of the site's ClientApp."""

from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from pathfed_client.gate.ports import Answer
from pathfed_client.transport.flower_client import make_app
from pathfed_common.protocol import wire

CONTEXT = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def bulk(data: bytes) -> ArrayRecord:
    return ArrayRecord({wire.BYTES: Array(dtype="uint8", shape=(len(data),), stype=wire.BULK_STYPE, data=data)})


def message(content: RecordDict) -> Message:
    return Message(content, dst_node_id=2, message_type=wire.MESSAGE_TYPE)


def offer() -> RecordDict:
    return RecordDict({wire.OFFER: ConfigRecord({wire.ENVELOPE: b"envelope"}), wire.BULK: bulk(b"base state")})


def never_refused(code: str) -> None:
    raise AssertionError(code)


def reply(answer: Answer, content: RecordDict | None = None) -> RecordDict:
    app = make_app(lambda envelope, base_state: answer, never_refused)
    return app(message(content or offer()), CONTEXT).content


def test_an_offer_is_handed_on_and_the_answer_packed(tmp_path):
    asked = []
    update = tmp_path / "update.safetensors"
    update.write_bytes(b"\0update\xff")

    def answer(envelope: bytes, base_state: bytes) -> Answer:
        asked.append((envelope, base_state))
        return Answer(code=None, statement=b"statement", update=update)

    sent = message(offer())
    got = make_app(answer, never_refused)(sent, CONTEXT)
    assert asked == [(b"envelope", b"base state")]
    assert dict(got.content.config_records[wire.REPLY]) == {wire.CODE: "", wire.ENVELOPE: b"statement"}
    assert got.content.array_records[wire.BULK][wire.BYTES].data == b"\0update\xff"
    assert got.metadata.reply_to_message_id == sent.metadata.message_id
    assert len(CONTEXT.state) == 0


def test_a_refusal_is_a_code_and_nothing_else():
    content = reply(Answer(code="PF407"))
    assert dict(content.config_records[wire.REPLY]) == {wire.CODE: "PF407", wire.ENVELOPE: b""}
    assert len(content) == 1


@pytest.mark.parametrize("answer", [Answer(code=None), Answer(code=None, statement=b"s"), Answer(code=None, update=Path("u"))])
def test_half_an_answer_is_none(answer):
    assert dict(reply(answer).config_records[wire.REPLY]) == {wire.CODE: "PF410", wire.ENVELOPE: b""}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({wire.OFFER: ConfigRecord({wire.ENVELOPE: b"envelope"})}),
        RecordDict({wire.BULK: bulk(b"x")}),
        RecordDict({wire.OFFER: ConfigRecord({}), wire.BULK: bulk(b"x")}),
        RecordDict({wire.OFFER: ConfigRecord({wire.ENVELOPE: "text"}), wire.BULK: bulk(b"x")}),
        RecordDict({wire.OFFER: ConfigRecord({wire.ENVELOPE: b"e"}), wire.BULK: ArrayRecord()}),
        RecordDict({wire.OFFER: bulk(b"x"), wire.BULK: ConfigRecord({})}),
    ],
)
def test_another_message_is_malformed_and_asks_nothing(content):
    def never(envelope: bytes, base_state: bytes) -> Answer:
        raise AssertionError("asked")

    written: list[str] = []
    got = make_app(never, written.append)(message(content), CONTEXT)
    assert dict(got.content.config_records[wire.REPLY]) == {wire.CODE: "PF405", wire.ENVELOPE: b""}
    assert written == ["PF405"], "written down before it leaves"
