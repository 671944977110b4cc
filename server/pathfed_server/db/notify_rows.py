"""Where each receiver of notifications stands, as the database has it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReceiverRow:
    """A receiver.

    Attributes:
        receiver: its name.
        after: events up to this number are done with.
        until: the message under way tells of events after `after` up to this one; None: none is under way.
        events: how many events that message tells of.
        began_at: when it was first tried, UTC seconds as the times below; None: none is under way.
        attempts: how often it has been tried.
        next_at: when it is tried again; None: at once.
        code: why the last attempt failed; None: none has failed since the last message arrived.
        sent: messages that arrived.
        sent_at: when the last one did, or None.
        given_up: messages given up.
    """

    receiver: str
    after: int
    until: int | None
    events: int
    began_at: float | None
    attempts: int
    next_at: float | None
    code: str | None
    sent: int
    sent_at: float | None
    given_up: int
