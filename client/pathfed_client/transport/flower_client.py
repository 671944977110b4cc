"""The site's Flower ClientApp: offers in, answers out.

It takes apart Flower's message, hands the signed offer to the site's answerer, and packs the answer: a signed statement, or a code. It
holds no state and knows no privacy: the gate, the ledger and the private step are behind the answerer, and so is the bulk plane, over which
base state and update have moved when the statement is there.
"""

from flwr.app import ConfigRecord, Context, Message, RecordDict
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
    except (KeyError, AttributeError, TypeError):
        envelope = None
    if not isinstance(envelope, bytes):
        refusals(ErrorCode.MESSAGE_MALFORMED.value)
        return Answer(code=ErrorCode.MESSAGE_MALFORMED.value)
    return answer(envelope)


def _content(answer: Answer) -> RecordDict:
    if answer.code is not None or answer.statement is None:
        return RecordDict({wire.REPLY: ConfigRecord({wire.CODE: answer.code or ErrorCode.SITE_INTERNAL.value, wire.ENVELOPE: b""})})
    return RecordDict({wire.REPLY: ConfigRecord({wire.CODE: "", wire.ENVELOPE: answer.statement})})
