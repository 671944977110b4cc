"""Moments and lengths of time: as people read them, and as they type them."""

import datetime
import re
import time

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGO = re.compile(r"^(\d{1,9})([smhd])$")


def moment(at: float) -> str:
    """UTC seconds as a date and a time."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(at))


def duration(seconds: float) -> str:
    """A length of time in the two units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def typed_moment(text: str, *, now: float) -> float:
    """UTC seconds that a person typed: ``2026-11-30``, ``2026-11-30T12:00`` (UTC where no zone is given), or ``90m`` for so long ago.

    Raises:
        ValueError: neither.
    """
    ago = _AGO.match(text)
    if ago is not None:
        return now - int(ago[1]) * _UNITS_S[ago[2]]
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("neither a number of an event, a date with or without time (2026-11-30T12:00), nor a time ago (90m)") from None
    return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()
