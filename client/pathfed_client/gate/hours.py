"""The hours within which a site lets rounds begin, by the clock on its own wall. Pure.

A window such as 19:00-07:00 belongs to the day on which it begins: Friday's reaches into Saturday's morning, whatever weekends are.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

Weekends = Literal["as_other_days", "all_day", "never"]

ALWAYS = ""
#: "HH:MM-HH:MM"; an end at or before the beginning is the next day's.
FORM = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])")
_SATURDAY = 5
_DAY_MIN = 24 * 60


@dataclass(frozen=True)
class Window:
    """A daily window.

    Attributes:
        begin_min: minutes after midnight at which it begins.
        length_min: minutes that it lasts, at most a day.
    """

    begin_min: int
    length_min: int


def window(text: str) -> Window:
    """Read "HH:MM-HH:MM".

    Raises:
        ValueError: not of this form, or empty.
    """
    found = FORM.fullmatch(text)
    if found is None:
        raise ValueError(f'must be "HH:MM-HH:MM" such as "19:00-07:00", or "" for always, got {text!r}')
    first_h, first_min, last_h, last_min = (int(part) for part in found.groups())
    begin, end = first_h * 60 + first_min, last_h * 60 + last_min
    if begin == end:
        raise ValueError(f'must not begin and end at the same minute; "" is always, got {text!r}')
    return Window(begin, (end - begin) % _DAY_MIN)


def zone(name: str) -> tzinfo:
    """A time zone by its name in the tz database.

    Raises:
        ValueError: there is none of that name on this machine.
    """
    if name == "UTC":
        return UTC  # needs no database
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f'must be a time zone that this machine knows, such as "Europe/Berlin" or "UTC", got {name!r}') from None


def may_begin(hours: str, weekends: Weekends, time_zone: str, now: float) -> bool:
    """Whether a round may begin now.

    | weekends | Saturday and Sunday |
    | --- | --- |
    | as_other_days | the same window |
    | all_day | all day long, and the window besides where it reaches into the next day |
    | never | no window begins; Friday's still ends when it ends |

    Args:
        hours: "HH:MM-HH:MM", or "" for always.
        weekends: what holds on Saturdays and Sundays.
        time_zone: name of the time zone.
        now: UTC seconds.
    """
    if hours == ALWAYS and weekends != "never":
        return True
    local = datetime.fromtimestamp(now, zone(time_zone))
    daily = Window(0, _DAY_MIN) if hours == ALWAYS else window(hours)
    minute = local.hour * 60 + local.minute
    today, yesterday = local.weekday(), (local - timedelta(days=1)).weekday()
    if today >= _SATURDAY and weekends == "all_day":
        return True
    return _open(daily, today, weekends, minute) or _open(daily, yesterday, weekends, minute + _DAY_MIN)


def _open(daily: Window, weekday: int, weekends: Weekends, minute: int) -> bool:
    """Whether the window that begins on a weekday holds the minute, counted from that day's midnight."""
    if weekday >= _SATURDAY and weekends == "never":
        return False
    return daily.begin_min <= minute < daily.begin_min + daily.length_min
