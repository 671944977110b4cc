"""Which events a person asked for."""

import re
from collections.abc import Callable, Sequence

from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.ids import RunName
from pathfed_server.db.rows import AuditRow
from pathfed_server.watching.event_lines import facts_of
from pathfed_server.watching.spans import typed_moment

_KIND = re.compile(r"^[a-z][a-z_]*(\.[a-z][a-z_]*)?$")
_NEWEST_NUMBER = 2**63 - 1


def start_of(since: str | None, *, now: float) -> tuple[int, float | None]:
    """Where to start: after which number, and from which UTC seconds on.

    Raises:
        HostError: PF905, neither a number nor a time.
    """
    if since is None:
        return 0, None
    if since.isascii() and since.isdigit() and int(since) <= _NEWEST_NUMBER:
        return int(since), None
    try:
        return 0, typed_moment(since, now=now)
    except ValueError as error:
        raise HostError(ErrorCode.SETTINGS_INVALID, str(error), where="--since", value=since) from None


def chosen(run: RunName | None, kinds: Sequence[str], not_before: float | None) -> Callable[[AuditRow], bool]:
    """Whether an event was asked for.

    Args:
        run: events about this run alone.
        kinds: of one of these kinds; a kind without a dot is a whole family, such as ``round``.
        not_before: that happened at these UTC seconds or later.

    Raises:
        HostError: PF905, not a kind.
    """
    for kind in kinds:
        if not _KIND.match(kind):
            raise HostError(ErrorCode.SETTINGS_INVALID, "not a kind of event, such as round.failed or round", where="--kind", value=kind)

    def wanted(row: AuditRow) -> bool:
        if kinds and row.action not in kinds and row.action.partition(".")[0] not in kinds:
            return False
        return (not_before is None or row.at >= not_before) and (run is None or facts_of(row).run == run)

    return wanted
