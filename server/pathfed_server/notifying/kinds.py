"""Which events of the audit trail people are told of, and what they are told: a few fields, and nothing else that an event may hold."""

import re
from dataclasses import dataclass

from pathfed_server.db.rows import AuditRow
from pathfed_server.watching.event_lines import facts_of

#: Kinds that a receiver may ask for, with what each is called in a mail.
KINDS = {
    "round.failed": "round failed",
    "quorum.lost": "quorum lost",
    "site.late": "site late",
    "site.refused": "site refused",
    "site.suspended": "site suspended",
    "run.failed": "run failed",
    "run.finished": "run finished",
    "notification.failed": "notification given up",
}
#: Actions of the trail that count as a kind of another name: nothing came by the deadline, or it came after it.
_ALSO = {"site.silent": "site.late"}
#: Actions that are looked for in the trail.
ACTIONS = (*KINDS, *_ALSO)
_NAME = re.compile(r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$")
_CODE = re.compile(r"^PF\d{3}$")


@dataclass(frozen=True, kw_only=True)
class Notice:
    """One event as it is told.

    Attributes:
        id: the event's number.
        kind: one of `KINDS`.
        at: UTC seconds.
        run: the run's name, or None.
        round: the round's number, or None.
        site: the site's name, or for ``notification.failed`` the receiver's, or None.
        code: an error code, or None.
    """

    id: int
    kind: str
    at: float
    run: str | None
    round: int | None
    site: str | None
    code: str | None


def notice_of(row: AuditRow) -> Notice | None:
    """What is told of an event; None: nobody is told of it.

    Names and codes are taken only where they look like names and codes, so that no text from elsewhere travels in their place.
    """
    kind = _ALSO.get(row.action, row.action)
    facts = facts_of(row)
    if kind not in KINDS or (kind == "site.refused" and facts.run is None):  # a site that asked to be enrolled
        return None
    site = row.subject if kind == "notification.failed" else facts.site
    return Notice(
        id=facts.id,
        kind=kind,
        at=facts.at,
        run=_matching(_NAME, facts.run),
        round=facts.round,
        site=_matching(_NAME, site),
        code=_matching(_CODE, facts.code),
    )


def _matching(pattern: re.Pattern[str], text: str | None) -> str | None:
    return text if text is not None and pattern.match(text) else None
