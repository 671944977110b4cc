"""Handing a message to a receiver of either kind."""

import time

from pathfed_server.notifying.bodies import SIGNATURE, mail, signature, webhook_body
from pathfed_server.notifying.message import Message
from pathfed_server.notifying.settings import Mailbox, Receiver, Webhook
from pathfed_server.transport import smtp, webhook
from pathfed_server.transport.delivery import Delivered
from pathfed_server.transport.smtp import MailServer

#: A receiver that has not taken a message after so long has not taken it, seconds.
WITHIN_S = 20.0


def deliver(receiver: Receiver, message: Message, *, within_s: float = WITHIN_S) -> Delivered:
    """Hand a message over.

    Raises:
        RoundError: PF580, it is not taken; PF581, not in time; PF582, TLS fails; PF583, nobody is reached.
    """
    if isinstance(receiver, Webhook):
        return _call(receiver, message, within_s)
    return _send(receiver, message, within_s)


def _call(receiver: Webhook, message: Message, within_s: float) -> Delivered:
    body = webhook_body(message, sent_at=time.time())
    headers = {SIGNATURE: signature(receiver.secret, body)}
    return webhook.call(receiver.settings.url, body, headers, receiver.tls, within_s=within_s)


def _send(receiver: Mailbox, message: Message, within_s: float) -> Delivered:
    given = receiver.settings
    server = MailServer(given.host, given.port, given.security, given.user, receiver.password, receiver.tls)
    made = mail(message, sender=given.sender, recipients=given.recipients, sent_at=time.time())
    return smtp.hand_in(made, server, within_s=within_s)
