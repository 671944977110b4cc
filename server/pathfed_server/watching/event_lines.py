"""One event of the audit trail, for people and for scripts: what it is about, in the same few fields whatever its kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pathfed_common.error_catalog import CATALOG
from pathfed_common.errors import ErrorCode
from pathfed_server.db.rows import AuditRow
from pathfed_server.watching.spans import moment

#: What lines for people are laid out for.
COLUMNS = 100
_KIND_WIDTH = 15
#: Kinds of which the first word says what the subject is.
_SUBJECT_IS_RUN = frozenset({"run", "round", "quorum"})
_SUBJECT_IS_SITE = frozenset({"site", "update", "quarantine", "certificate", "keys"})


@dataclass(frozen=True, kw_only=True)
class EventFacts:
    """An event in fields.

    Attributes:
        id: its number: greater than that of every event before it, and never used again. Following resumes after it.
        at: UTC seconds.
        kind: what was done, such as ``round.failed``.
        actor: who did it.
        subject: to what, as the trail has it.
        run: the run it is about, or None; likewise the three below.
        round: the round's number.
        site: the site.
        code: a code that says why.
    """

    id: int
    at: float
    kind: str
    actor: str
    subject: str
    run: str | None
    round: int | None
    site: str | None
    code: str | None


def facts_of(row: AuditRow) -> EventFacts:
    """The fields of an event. Nothing else of its detail is taken, whatever that holds."""
    detail: Mapping[str, Any] = row.detail if isinstance(row.detail, dict) else {}
    family = row.action.partition(".")[0]
    run = row.subject if family in _SUBJECT_IS_RUN else detail.get("run")
    site = row.subject if family in _SUBJECT_IS_SITE else detail.get("site")
    return EventFacts(
        id=row.seq,
        at=row.at,
        kind=row.action,
        actor=row.actor,
        subject=row.subject,
        run=_text(run),
        round=_number(detail.get("round")),
        site=_text(site),
        code=_text(detail.get("code")),
    )


def for_scripts(row: AuditRow) -> dict[str, object]:
    """An event as `--json` prints it: its fields, and all of its detail."""
    return {**vars(facts_of(row)), "detail": row.detail}


def for_people(row: AuditRow) -> str:
    """An event as one line; a code with its title where that fits a terminal."""
    facts = facts_of(row)
    place = [facts.run or "", f"round {facts.round}" if facts.round is not None else "", facts.site or ""]
    about = " ".join(part for part in place if part) or facts.subject
    by = "" if facts.actor in ("server", f"site:{facts.site}") else f"by {facts.actor}"

    def line(why: str) -> str:
        parts = [moment(facts.at), f"{facts.kind:<{_KIND_WIDTH}}", about, why, _sites(row.detail), by]
        return f"{facts.id:>6}  " + "  ".join(part for part in parts if part)

    whole = line(reason(facts.code))
    return whole if len(whole) <= COLUMNS else line(facts.code or "")


def reason(code: str | None) -> str:
    """A code with its page's title; nothing where there is none."""
    if code is None:
        return ""
    known = known_code(code)
    return code if known is None else f"{code} {CATALOG[known].title}"


def known_code(code: str) -> ErrorCode | None:
    """The code of this version that a text names, or None."""
    return next((known for known in ErrorCode if known.value == code), None)


def _sites(detail: object) -> str:
    """Why a round failed, site by site, where the event says so."""
    sites = detail.get("sites") if isinstance(detail, dict) else None
    return ", ".join(f"{site} {why}" for site, why in sites.items()) if isinstance(sites, dict) else ""


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
