from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from pathfed_client.gate.hours import Window, may_begin, window, zone

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> float:
    """UTC seconds of a day and time in Berlin. 2026-11-23 is a Monday."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()


@pytest.mark.parametrize(
    ("text", "begin", "length"), [("19:00-07:00", 1140, 720), ("08:15-08:16", 495, 1), ("00:00-23:59", 0, 1439), ("23:59-00:00", 1439, 1)]
)
def test_a_window_ends_on_the_next_day_where_it_must(text, begin, length):
    assert window(text) == Window(begin, length)


@pytest.mark.parametrize("text", ["", "19-7", "19:00", "24:00-07:00", "19:00-07:60", "19:00 - 07:00", "7:00-19:00", "07:00-07:00", "x"])
def test_other_forms_are_refused_with_the_allowed_one(text):
    with pytest.raises(ValueError, match=r"HH:MM-HH:MM|same minute"):
        window(text)


@pytest.mark.parametrize("name", ["Mars/Olympus", "", "../../etc/passwd", "Europe", "europe/ber\x00lin"])
def test_zones_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match="time zone that this machine knows"):
        zone(name)


@pytest.mark.parametrize(
    ("moment", "open_"),
    [
        ("2026-11-23T18:59", False),
        ("2026-11-23T19:00", True),
        ("2026-11-23T23:59", True),
        ("2026-11-24T00:00", True),
        ("2026-11-24T06:59", True),
        ("2026-11-24T07:00", False),
        ("2026-11-24T12:00", False),
    ],
)
def test_a_night_holds_by_the_clock_of_the_sites_own_zone(moment, open_):
    assert may_begin("19:00-07:00", "as_other_days", "Europe/Berlin", at(moment)) is open_
    assert may_begin("18:00-06:00", "as_other_days", "UTC", at(moment)) is open_  # Berlin is an hour ahead in November


@pytest.mark.parametrize(
    ("moment", "as_other_days", "all_day", "never"),
    [
        ("2026-11-27T20:00", True, True, True),  # Friday evening
        ("2026-11-28T06:00", True, True, True),  # Saturday morning, Friday's window
        ("2026-11-28T12:00", False, True, False),
        ("2026-11-28T20:00", True, True, False),
        ("2026-11-29T12:00", False, True, False),  # Sunday
        ("2026-11-30T06:00", True, True, False),  # Monday morning, Sunday's window
        ("2026-11-30T12:00", False, False, False),
        ("2026-11-30T20:00", True, True, True),
    ],
)
def test_weekends_are_as_the_policy_says(moment, as_other_days, all_day, never):
    found = [may_begin("19:00-07:00", weekends, "Europe/Berlin", at(moment)) for weekends in ("as_other_days", "all_day", "never")]
    assert found == [as_other_days, all_day, never]


def test_without_hours_only_weekends_can_be_closed():
    monday, sunday = at("2026-11-23T03:00"), at("2026-11-29T03:00")
    assert may_begin("", "as_other_days", "Europe/Berlin", sunday)
    assert may_begin("", "all_day", "Europe/Berlin", sunday)
    assert may_begin("", "never", "Europe/Berlin", monday)
    assert not may_begin("", "never", "Europe/Berlin", sunday)
