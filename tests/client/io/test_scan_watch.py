import os

import pytest

from pathfed_client.io.scan_reading import InlineExecutor
from pathfed_client.io.scan_report import CohortEmptyError, ScanEndedError, ScanReport
from pathfed_client.io.scan_watch import watch
from pathfed_common.errors import ErrorCode, HostError, SiteDataError


class Counts(InlineExecutor):
    """Counts what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def submit(self, task, /):
        self.read.append(task.name)
        super().submit(task)


def watched(site, *between, at_rest_s=0.0):
    """Run a watch with these deeds between its passes; what it told, and what it read."""
    told, executor, deeds = [], Counts(), list(between)

    def sleep(seconds):
        assert seconds == 5.0
        if not deeds:
            raise KeyboardInterrupt
        deeds.pop(0)()

    with pytest.raises(KeyboardInterrupt):
        watch(lambda memory: site.scan(executor=executor, memory=memory), told.append, every_s=5.0, at_rest_s=at_rest_s, sleep=sleep)
    return told, executor.read


def test_new_and_changed_slides_are_taken_up_and_known_ones_left_alone(site):
    site.add("a.tif")
    site.map(a="P1", b="P2")
    told, read = watched(
        site, lambda: site.add("b.tif"), lambda: None, lambda: site.write_slide(site.folder / "a.tif", shift=300), lambda: None
    )
    assert read == ["a.tif", "b.tif", "a.tif"]
    assert [one.patients for one in told if isinstance(one, ScanReport) and one.slides_read] == [1, 2, 2]


def test_bad_slide_is_tried_once_a_watch_unless_it_changes(site):
    site.add("a.tif")
    (site.folder / "b.tif").write_bytes(b"no slide")
    site.map(a="P1", b="P2")
    _, read = watched(site, lambda: None, lambda: None, lambda: site.add("b.tif"))
    assert read == ["a.tif", "b.tif", "b.tif"]


def test_slide_that_is_being_copied_waits(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    os.utime(site.folder / "a.tif", (0, 0))
    told, read = watched(site, lambda: None, lambda: os.utime(site.folder / "b.tif", (0, 0)), at_rest_s=3600.0)
    assert read == ["a.tif", "b.tif"]
    assert told[0].left == ("b.tif",)


def test_what_can_come_right_by_itself_is_told_once_and_waited_for(site):
    (site.folder / "a.tif").write_bytes(b"no slide")
    site.map(a="P1", b="P2")
    rows = site.list.read_text()
    told, _ = watched(
        site,
        lambda: site.list.unlink(),
        lambda: None,
        lambda: (site.list.write_text(rows), site.add("b.tif")),
    )
    assert isinstance(told[0], CohortEmptyError)
    assert [one.code for one in told if isinstance(one, SiteDataError)] == [ErrorCode.COHORT_EMPTY, ErrorCode.PATIENT_LIST_UNREADABLE]
    assert told[-1].patients == 1


def test_list_in_doubt_is_told_with_its_report_once_and_the_rest_is_taken_up(site):
    site.add("a.tif", "b.tif")
    site.write_list("slide,patient", "a.tif,P1", "b.tif,P2", "b.tif,P3")
    told, read = watched(site, lambda: None, lambda: site.add("c.tif"), lambda: site.map(a="P1", b="P2"))
    assert read == ["a.tif", "b.tif"]
    assert [type(one) for one in told] == [ScanEndedError, ScanEndedError, ScanEndedError, ScanReport]
    assert [one.report.slides_read for one in told[:3]] == [1, 0, 0]
    assert [one.report.patients for one in told[:3]] == [1, 1, 1]


def test_what_cannot_ends_the_watch():
    def full(memory):
        raise HostError(ErrorCode.DISK_FULL, "full")

    with pytest.raises(HostError, match="PF901"):
        watch(full, print, every_s=1.0, at_rest_s=0.0, sleep=lambda seconds: None)
