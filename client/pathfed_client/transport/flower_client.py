"""The site's Flower ClientApp: offers in, answers out.

It takes apart Flower's message, hands the signed offer and the base state's bytes to the site's answerer, and packs the answer. It holds
no state and knows no privacy: the gate, the ledger and the private step are behind the answerer.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from pathfed_client.gate.ports import Answer, Answerer, Refusals
from pathfed_common.errors import ErrorCode
from pathfed_common.protocol import wire


def make_app(answer: Answerer, refusals: Refusals) -> ClientApp:
    """A ClientApp that answers round offers. What is no offer gets a code, which `refusals` is told of first."""
    app = ClientApp()

    def train(message: Message, context: Context) -> Message:
        del context  # site state that matters is on the site's disk, never in Flower's context
        return Message(_content(_answer(answer, refusals, message)), reply_to=message)

    app.train()(train)
    return app


def _answer(answer: Answerer, refusals: Refusals, message: Message) -> Answer:
    try:
        envelope = message.content.config_records[wire.OFFER][wire.ENVELOPE]
        base_state = message.content.array_records[wire.BULK][wire.BYTES].data
    except (KeyError, AttributeError, TypeError):
        envelope = None
    if not isinstance(envelope, bytes):
        refusals(ErrorCode.MESSAGE_MALFORMED.value)
        return Answer(code=ErrorCode.MESSAGE_MALFORMED.value)
    return answer(envelope, base_state)


def _content(answer: Answer) -> RecordDict:
    if answer.code is not None or answer.statement is None or answer.update is None:
        return RecordDict({wire.REPLY: ConfigRecord({wire.CODE: answer.code or ErrorCode.SITE_INTERNAL.value, wire.ENVELOPE: b""})})
    data = answer.update.read_bytes()
    bulk = Array(dtype="uint8", shape=(len(data),), stype=wire.BULK_STYPE, data=data)
    return RecordDict(
        {wire.REPLY: ConfigRecord({wire.CODE: "", wire.ENVELOPE: answer.statement}), wire.BULK: ArrayRecord({wire.BYTES: bulk})}
    )
