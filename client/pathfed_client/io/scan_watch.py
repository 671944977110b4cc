"""Watching slide folders: scans one after the other that remember each other, until interrupted.

A scan reads what is new or has changed and is at rest; what is known is looked at once a pass, in the folder's listing, and not opened.
A share that is away, a patient list that is just being written, or a cohort that is still empty is told and waited for; a full disk or
a lost scheduler ends the watch.
"""

import time
from collections.abc import Callable

from pathfed_client.io.scan import ScanMemory
from pathfed_client.io.scan_planning import Settling
from pathfed_client.io.scan_report import ScanEndedError, ScanReport
from pathfed_common.errors import SiteDataError

Told = Callable[[ScanReport | SiteDataError], None]


def watch(
    scan_once: Callable[[ScanMemory], ScanReport],
    tell: Told,
    *,
    every_s: float,
    at_rest_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Scan again and again.

    Args:
        scan_once: one scan with the memory it is given.
        tell: told each pass's report or error when it differs from the one before, or something was read.
        every_s: seconds from the end of a scan to the beginning of the next.
        at_rest_s: a slide is read once its size and time have been at rest this long, seconds.
        sleep: waits; whatever it raises ends the watch.

    Raises:
        HostError: what ends the watch.
    """
    memory = ScanMemory(settling=Settling(seconds=at_rest_s))
    before: object = None
    while True:
        found: ScanReport | SiteDataError
        try:
            found = scan_once(memory)
        except SiteDataError as error:
            found = error
        now = _gist(found)
        if now != before:
            tell(found)
        before = now
        memory.retry = False
        sleep(every_s)


def _gist(found: ScanReport | SiteDataError) -> object:
    """What a pass has to say: a pass that says the same again is not told."""
    if isinstance(found, ScanEndedError):
        return found.code, found.report
    if isinstance(found, SiteDataError):
        return found.render()
    return found
