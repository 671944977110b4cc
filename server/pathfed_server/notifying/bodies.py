"""A message as a webhook's signed JSON body, and as a mail. Pure.

A receiver checks `X-Pathfed-Signature: sha256=<hex>`: HMAC-SHA256 over the body's exact bytes with the shared secret. Against replays it
looks at `sent_at` in the body, and remembers the message's `id`, which stays the same when a message is sent again.
"""

import hashlib
import hmac
import json
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime

from pathfed_common.error_catalog import CATALOG
from pathfed_server.notifying.kinds import KINDS
from pathfed_server.notifying.message import Group, Message
from pathfed_server.watching.event_lines import known_code, reason
from pathfed_server.watching.spans import moment

SIGNATURE = "X-Pathfed-Signature"


def webhook_body(message: Message, *, sent_at: float) -> bytes:
    """The JSON body of a webhook's call."""
    told = {
        "id": message.id,
        "consortium": message.consortium,
        "sent_at": sent_at,
        "test": message.test,
        "count": message.count,
        "events": [vars(notice) for notice in message.notices],
        "groups": [vars(group) for group in message.groups],
    }
    return json.dumps(told, separators=(",", ":")).encode("ascii")


def signature(secret: bytes, body: bytes) -> str:
    """The value of the signature's header."""
    return "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest()


def mail(message: Message, *, sender: str, recipients: tuple[str, ...], sent_at: float) -> EmailMessage:
    """The message as a mail in plain text."""
    made = EmailMessage()
    made["From"] = sender
    made["To"] = ", ".join(recipients)
    made["Subject"] = _subject(message)
    made["Date"] = format_datetime(datetime.fromtimestamp(sent_at, UTC))
    made["Message-ID"] = f"<{message.id}@{message.consortium}.pathfed>"
    made["Auto-Submitted"] = "auto-generated"
    made.set_content(_text(message))
    return made


def _subject(message: Message) -> str:
    start = f"[pathfed {message.consortium}]"
    if message.test:
        return f"{start} a test"
    if len(message.groups) == 1 and message.count == 1:
        return f"{start} {_headline(message.groups[0])}"
    counts = ", ".join(f"{KINDS[kind]} {number:,}" for kind, number in message.counts.items())
    return f"{start} {counts}"


def _headline(group: Group) -> str:
    times = f"{group.count:,} times " if group.count > 1 else ""
    code = f" ({group.code})" if group.code else ""
    return f"{KINDS[group.kind]}: {times}{_place(group)}".rstrip(": ") + code


def _place(group: Group) -> str:
    parts = [
        group.run or "",
        _rounds(group),
        *([", ".join(group.sites) + (" and more" if group.more_sites else "")] if group.sites else []),
    ]
    return " ".join(part for part in parts if part)


def _rounds(group: Group) -> str:
    if group.first_round is None:
        return ""
    return f"round {group.first_round}" if group.first_round == group.last_round else f"rounds {group.first_round} to {group.last_round}"


def _text(message: Message) -> str:
    if message.test:
        return "This is a test. Mails of this consortium's server arrive.\n"
    parts = []
    for group in message.groups:
        when = moment(group.first_at) if group.count == 1 else f"{moment(group.first_at)} to {moment(group.last_at)}"
        numbers = f"event {group.first_id}" if group.count == 1 else f"events {group.first_id} to {group.last_id}"
        lines = [_headline(group), f"  {when}, {numbers}"]
        known = known_code(group.code) if group.code else None
        if known is not None:
            lines += [f"  {reason(group.code)}", f"  {CATALOG[known].remedy}"]
        parts.append("\n".join(lines))
    told = sum(group.count for group in message.groups)
    if told < message.count:
        parts.append(f"{message.count - told:,} events more.")
    first = message.notices[0].id - 1
    parts.append(f"All of it: pathfed-server events --since {first}")
    return "\n\n".join(parts) + "\n"
