"""How the egress record is asked for and shown: `pathfed-site egress`."""

import csv
import json
import re
import sys
import time
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import typer

from pathfed_client.egress.entry import EgressEntry
from pathfed_client.egress.report import EgressTotals
from pathfed_client.io.egress_log import EgressHead
from pathfed_common import digest
from pathfed_common.console import show
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError

#: Messages that people are shown; all of them go into CSV and JSON.
SHOWN = 50
_AGE = re.compile(r"([0-9]{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_COLUMNS = (
    *(
        "sequence",
        "at",
        "time",
        "destination",
        "kind",
        "size",
        "digest",
        "plan",
        "run",
        "round_index",
        "epsilon_charged",
        "connection",
        "via",
    ),
)


def moment(since: str | None) -> float | None:
    """The time that `--since` means, UTC seconds: a day, a time, or an age.

    Raises:
        HostError: PF905, it is none of these.
    """
    if since is None:
        return None
    age = _AGE.fullmatch(since)
    if age is not None:
        return time.time() - int(age[1]) * _SECONDS[age[2]]
    try:
        found = datetime.fromisoformat(since)
        return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        remedy = "give a day (2026-11-30), a time in UTC (2026-11-30T08:00), or an age (90m, 24h, 7d)"
        raise HostError(ErrorCode.SETTINGS_INVALID, "not a time", where="--since", value=since[:80], remedy=remedy) from None


def noted_head(text: str | None) -> Digest | None:
    """The head that was noted.

    Raises:
        HostError: PF905, it is no digest.
    """
    try:
        return None if text is None else digest.parse(text)
    except ValueError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, str(error), where="--head", remedy="give it as --verify printed it") from None


def show_record(entries: Iterable[EgressEntry], proven: EgressHead | None, *, as_csv: bool, as_json: bool) -> None:
    """Print entries with their sums: as a table of the latest messages, as CSV row by row, or as one JSON value."""
    totals = EgressTotals()
    if as_csv:
        out = csv.DictWriter(sys.stdout, _COLUMNS)
        out.writeheader()
        for entry in entries:
            out.writerow({**entry.row(), "time": datetime.fromtimestamp(entry.at, UTC).isoformat(timespec="milliseconds")})
        return
    head = {} if proven is None else {"verified": True, "entries_in_chain": proven.entries, "head": proven.head}
    if as_json:
        rows = [entry.row() for entry in totals.counting(entries)]
        typer.echo(json.dumps({**head, **totals.to_dict(), "entries": rows}))
        return
    latest = deque((entry for entry in totals.counting(entries) if not entry.sent.kind.is_connection), SHOWN)
    _show_totals(totals, head)
    more = sum(totals.messages.values()) - len(latest)
    show([_shown(entry) for entry in latest], as_json=False, title="messages" + (f" (the latest; {more} more with --csv)" if more else ""))


def _show_totals(totals: EgressTotals, head: dict[str, Any]) -> None:
    if head:
        show(head, as_json=False, title="The record is whole: every entry follows from the one before. Note the head elsewhere.")
    by_kind = [{"kind": kind, "messages": count, "bytes": totals.sizes[kind]} for kind, count in sorted(totals.messages.items())]
    show(by_kind, as_json=False, title="what left")
    by_place = [{"destination": place, "bytes": size} for place, size in sorted(totals.sent.items())]
    show(by_place, as_json=False, title="bytes that connections carried, these messages among them")
    rest = {"epsilon_charged": totals.epsilon_charged, "connections_not_closed": len(totals.unclosed)}
    show(rest, as_json=False)


def _shown(entry: EgressEntry) -> dict[str, Any]:
    sent = entry.sent
    return {
        "at": entry.at,
        "destination": sent.destination,
        "kind": sent.kind.value,
        "bytes": sent.size,
        "sha256": digest.short(sent.digest),
        "run": sent.run,
        "round": sent.round_index,
        "epsilon": sent.epsilon_charged,
    }
