"""What a scan makes of folders that change: several roots, shares that are away, files that move, copies, slides that come to no end."""

import os
import shutil
import time
from pathlib import Path

import pytest

from pathfed_client.io import scan_reading
from pathfed_client.io.scan import ScanMemory, scan
from pathfed_client.io.scan_planning import MOST_ATTEMPTS, Settling
from pathfed_client.io.scan_reading import InlineExecutor, SlideReading
from pathfed_client.io.site_records import SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.slides.tiling import scan_key
from pathfed_common.errors import ErrorCode, HostError, SiteDataError
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan(tile_px=224)
KEY = bytes(range(32))
USED = (SlideStatus.USABLE, None)
MISSING = (SlideStatus.MISSING, ErrorCode.SLIDE_MISSING)
DUPLICATE = (SlideStatus.REFUSED, ErrorCode.SLIDE_DUPLICATE)
SHARED = (SlideStatus.REFUSED, ErrorCode.SLIDE_SHARED)
CRASHED = (SlideStatus.REFUSED, ErrorCode.SLIDE_CRASHED)


def copy(site, source: str, target: str) -> None:
    shutil.copy(site.folder / source, site.folder / target)


def cohort(site):
    return site.store.cohort(scan_key(PLAN))


class Roots:
    """Two slide folders of one site."""

    def __init__(self, site) -> None:
        self.site = site
        self.folders = (site.folder.parent / "nas", site.folder.parent / "archive")
        for folder in self.folders:
            folder.mkdir()

    def add(self, root: int, *names: str) -> None:
        for name in names:
            self.site.write_slide(self.folders[root] / name, shift=sum(name.encode()) % 97 + 100 * root)

    def scan(self, *folders: Path):
        return scan(self.site.store, folders or self.folders, self.site.list, PLAN, KEY, now=7.0)


@pytest.fixture
def roots(site):
    return Roots(site)


# ---- several folders ----


def test_slides_of_several_folders_have_names_of_their_own(site, roots):
    roots.add(0, "a.tif", "b.tif")
    roots.add(1, "b.tif", "deep/c.tif")
    site.list.write_text("slide,patient\na.tif,P1\nnas//b.tif,P2\narchive//b.tif,P3\nc.tif,P4\n")
    assert roots.scan().patients == 4
    assert list(site.statuses()) == ["archive//b.tif", "archive//deep/c.tif", "nas//a.tif", "nas//b.tif"]


def test_name_that_fits_a_slide_in_each_folder_is_nobodys(site, roots):
    roots.add(0, "a.tif", "b.tif")
    roots.add(1, "b.tif")
    site.map(a="P1", b="P2")
    report = roots.scan()
    assert [(row.slide, row.ambiguous) for row in report.not_found] == [("b.tif", True)]
    assert report.patients == 1


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_share_that_is_away_takes_no_slide_with_it(site, roots, how):
    roots.add(0, "a.tif")
    roots.add(1, "b.tif")
    site.map(a="P1", b="P2")
    roots.scan()
    before = cohort(site).digest
    shutil.move(roots.folders[1], site.folder.parent / "unmounted")
    if how == "empty":  # as a mount point is
        roots.folders[1].mkdir()
    roots.add(0, "c.tif")
    site.map(a="P1", b="P2", c="P3")
    report = roots.scan()
    assert [(one.folder, one.code) for one in report.unreachable] == [("archive//", ErrorCode.SLIDE_FOLDER_UNREACHABLE)]
    assert site.statuses() == {"archive//b.tif": USED, "nas//a.tif": USED, "nas//c.tif": USED}
    assert (report.patients, report.slides_read, report.not_found) == (3, 1, ())
    (roots.folders[0] / "c.tif").unlink()
    shutil.rmtree(roots.folders[1], ignore_errors=True)
    shutil.move(site.folder.parent / "unmounted", roots.folders[1])
    assert roots.scan().slides_read == 0
    assert cohort(site).digest == before


def test_list_still_decides_about_slides_that_are_out_of_reach(site, roots):
    roots.add(0, "a.tif")
    roots.add(1, "b.tif", "c.tif")
    site.map(a="P1", b="P2", c="P3")
    roots.scan()
    shutil.rmtree(roots.folders[1])
    site.map(a="P1", c="P3")
    roots.scan()
    assert site.statuses()["archive//b.tif"] == (SlideStatus.UNMAPPED, ErrorCode.SLIDE_UNMAPPED)
    assert len(cohort(site).patients) == 2


def test_stems_and_whole_names_of_slides_in_several_folders_are_understood(site, roots):
    roots.add(0, "a.tif", "b.tif")
    roots.add(1, "b.tif", "deep/c.tif")
    site.write_list("slide,patient", "a,P1", "nas//b,P2", "archive//b,P3", "deep/c,P4")
    assert roots.scan().patients == 4


def test_other_resolution_of_a_slide_out_of_reach_counts_once_it_can_be_read(site, roots):
    roots.add(0, "a.tif")
    roots.add(1, "b.tif")
    site.write_list("slide,patient,organ,mpp", "a.tif,P1,,", "b.tif,P2,lung,0.5")
    roots.scan()
    number = site.numbers()["archive//b.tif"]
    shutil.move(roots.folders[1], site.folder.parent / "unmounted")
    site.write_list("slide,patient,organ,mpp", "a.tif,P1,,", "b.tif,P2,liver,0.49")
    assert roots.scan().patients == 2
    record = {one.path: one for one in site.store.slides(scan_key(PLAN)).values()}["archive//b.tif"]
    assert (record.mpp, record.attributes) == (0.5, {"organ": "liver", "mpp": "0.5"})
    shutil.move(site.folder.parent / "unmounted", roots.folders[1])
    assert roots.scan().slides_read == 1
    assert site.numbers()["archive//b.tif"] != number


def test_all_folders_away_is_an_error_that_changes_nothing(site, roots):
    roots.add(0, "a.tif")
    site.map(a="P1")
    roots.scan()
    shutil.rmtree(roots.folders[0])
    with pytest.raises(SiteDataError, match="PF201"):
        roots.scan()
    assert site.statuses() == {"nas//a.tif": USED}


def test_second_folder_renames_slides_and_reads_none_again(site, roots):
    roots.add(0, "a.tif")
    roots.add(1, "b.tif")
    site.map(a="P1", b="P2")
    roots.scan(roots.folders[0])
    number = site.numbers()["a.tif"]
    report = roots.scan()
    assert (report.slides_read, report.slides_moved) == (1, 1)
    assert site.numbers()["nas//a.tif"] == number


def test_folder_inside_another_is_refused_before_anything_is_done(site, roots):
    roots.add(0, "a.tif")
    site.map(a="P1")
    with pytest.raises(SiteDataError, match="PF217"):
        roots.scan(roots.folders[0], roots.folders[0] / "deep")
    assert site.statuses() == {}


# ---- content ----


@pytest.mark.parametrize("how", ["renamed", "copied and removed"])
def test_moved_slide_keeps_number_and_tiles_and_is_not_read(site, how):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    site.scan()
    before, number = cohort(site).digest, site.numbers()["a.tif"]
    (site.folder / "deep").mkdir()
    if how == "renamed":
        (site.folder / "a.tif").rename(site.folder / "deep" / "c.tif")
    else:
        copy(site, "a.tif", "deep/c.tif")
        (site.folder / "a.tif").unlink()
    site.map(c="P1", b="P2")
    report = site.scan()
    assert (report.slides_read, report.slides_moved, report.patients) == (0, 1, 2)
    assert site.numbers()["deep/c.tif"] == number
    assert site.statuses() == {"b.tif": USED, "deep/c.tif": USED}
    assert cohort(site).digest == before


def test_slide_moved_to_another_patients_line_becomes_that_patients(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2", c="P3")
    site.scan()
    (site.folder / "a.tif").rename(site.folder / "c.tif")
    assert site.scan().slides_read == 0
    (site.folder / "c.tif").rename(site.folder / "stray.tif")
    assert site.scan().slides_read == 0
    assert site.statuses()["stray.tif"] == (SlideStatus.UNMAPPED, ErrorCode.SLIDE_UNMAPPED)


def test_names_exchanged_among_slides_never_exchange_patients_content(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    site.scan()
    first = (site.folder / "a.tif").read_bytes()
    (site.folder / "a.tif").rename(site.folder / "t")
    (site.folder / "b.tif").rename(site.folder / "a.tif")
    (site.folder / "t").rename(site.folder / "b.tif")
    site.scan()
    with SiteStore(site.folder.parent / "fresh.db") as fresh:
        scan(fresh, site.folder, site.list, PLAN, KEY, now=7.0)
        tiles = [[(one.pseudonym, one.tile_count) for one in store.cohort(scan_key(PLAN)).patients] for store in (fresh, site.store)]
    assert tiles[0] == tiles[1]
    assert (site.folder / "b.tif").read_bytes() == first


def test_copy_under_the_same_patient_is_used_once_whatever_came_first(site):
    site.add("b.tif")
    site.map(a="P1", b="P1", c="P1")
    site.scan()
    copy(site, "b.tif", "c.tif")
    site.scan()
    assert site.statuses() == {"b.tif": USED, "c.tif": DUPLICATE}
    copy(site, "b.tif", "a.tif")
    report = site.scan()
    assert site.statuses() == {"a.tif": USED, "b.tif": DUPLICATE, "c.tif": DUPLICATE}
    assert (report.tiles, report.same_content) == (6, ())
    (site.folder / "a.tif").unlink()
    assert site.scan().slides_read == 0
    assert site.statuses() == {"a.tif": MISSING, "b.tif": USED, "c.tif": DUPLICATE}


def test_same_content_under_two_patients_takes_both_out_until_the_list_is_right(site):
    site.add("a.tif", "c.tif")
    copy(site, "a.tif", "b.tif")
    site.map(a="P1", b="P2", c="P3")
    report = site.scan()
    assert site.statuses() == {"a.tif": SHARED, "b.tif": SHARED, "c.tif": USED}
    assert report.same_content == (("a.tif", "b.tif"),)
    assert len(cohort(site).patients) == 1
    assert site.scan().slides_read == 0
    assert site.statuses()["a.tif"] == SHARED
    site.map(a="P1", b="P1", c="P3")
    assert site.scan().slides_read == 0
    assert site.statuses() == {"a.tif": USED, "b.tif": DUPLICATE, "c.tif": USED}
    site.map(a="P1", b="P2", c="P3")
    site.scan()
    assert site.statuses()["b.tif"] == SHARED
    site.map(a="P1", c="P3")
    site.scan()
    assert site.statuses() == {"a.tif": USED, "b.tif": (SlideStatus.UNMAPPED, ErrorCode.SLIDE_UNMAPPED), "c.tif": USED}


def test_copy_that_comes_later_for_another_patient_takes_the_used_one_out_in_one_step(site):
    """At no commit are both usable: what a round sees between two commits is what a reader of the database sees."""
    site.add("b.tif", "c.tif")
    site.map(a="P1", b="P2", c="P3")
    site.scan()
    copy(site, "b.tif", "a.tif")
    seen = []

    class Looks(InlineExecutor):
        def finished(self):
            seen.append(site.statuses())
            return super().finished()

    site.scan(executor=Looks(), progress=lambda done, total: seen.append(site.statuses()))
    assert seen[-1] == {"a.tif": SHARED, "b.tif": SHARED, "c.tif": USED}
    assert all(states["a.tif"] != USED for states in seen)


# ---- reading that comes to no end ----


class Fails(InlineExecutor):
    """Gives a code for the slide of one name."""

    def __init__(self, name: str, code: ErrorCode) -> None:
        super().__init__()
        self.name, self.code, self.tried = name, code, 0

    def finished(self):
        if self._tasks[0].name != self.name:
            return super().finished()
        self.tried += 1
        return [SlideReading(number=self._tasks.pop(0).number, code=self.code, detail="it ended")]


@pytest.mark.parametrize("code", [ErrorCode.SLIDE_CRASHED, ErrorCode.SLIDE_TIMEOUT])
def test_slide_that_ends_its_reader_is_tried_a_few_times_and_again_once_it_changed(site, code):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    executor = Fails("a.tif", code)
    for _ in range(MOST_ATTEMPTS + 2):
        site.scan(executor=executor)
        assert site.statuses() == {"a.tif": (SlideStatus.REFUSED, code), "b.tif": USED}
    assert executor.tried == MOST_ATTEMPTS
    os.utime(site.folder / "a.tif", ns=(1, 1))
    assert site.scan().patients == 2


class Dies(InlineExecutor):
    """Takes the whole scan with it, as a power cut does, when it meets the slide of one name."""

    def __init__(self, name: str, error: BaseException) -> None:
        super().__init__()
        self.name, self.error, self.seen = name, error, []

    def finished(self):
        self.seen.append(self._tasks[0].name)
        if self._tasks[0].name == self.name:
            self.close()
            raise self.error
        return super().finished()


def test_slide_that_takes_the_machine_with_it_is_not_tried_for_ever(site, monkeypatch):
    site.add("a.tif", "b.tif", "c.tif", "d.tif")
    site.map(a="P1", b="P2", c="P3", d="P4")
    monkeypatch.setattr("pathfed_client.io.scan_rows.SlideRows.undo_begin", lambda self, paths: None)  # the dead undo nothing
    executor = Dies("b.tif", HostError(ErrorCode.PROCESS_ENDED, "power cut"))
    for _ in range(MOST_ATTEMPTS):
        with pytest.raises(HostError):
            site.scan(executor=executor)
    assert executor.seen == ["a.tif", "b.tif", "b.tif", "c.tif", "d.tif", "b.tif"]
    assert site.scan(executor=executor).slides_read == 0
    assert site.statuses() == {"a.tif": USED, "b.tif": CRASHED, "c.tif": USED, "d.tif": USED}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), HostError(ErrorCode.SCHEDULER_LOST, "gone")])
def test_scan_that_was_stopped_in_order_blames_no_slide(site, error):
    site.add("a.tif", "b.tif", "c.tif")
    site.map(a="P1", b="P2", c="P3")
    for _ in range(MOST_ATTEMPTS + 1):
        with pytest.raises(type(error)):
            site.scan(executor=Dies("b.tif", error))
    assert [record.attempts for record in site.store.slides(scan_key(PLAN)).values()] == [0, 0, 0]
    assert site.scan().slides_read == 2


def test_resumed_scan_does_not_repeat_what_the_interrupted_one_could_not_read(site):
    site.add("b.tif", "c.tif")
    (site.folder / "a.tif").write_bytes(b"no slide")
    site.map(a="P1", b="P2", c="P3")
    with pytest.raises(KeyboardInterrupt):
        site.scan(executor=Dies("b.tif", KeyboardInterrupt()))
    assert site.scan().slides_read == 2
    assert site.scan().slides_read == 1


def test_slides_are_numbered_in_order_before_the_first_is_read(site):
    class Backwards(InlineExecutor):
        slots = 3

        def finished(self):
            self._tasks.reverse()
            return super().finished()

    site.add("a.tif", "b.tif", "c.tif", "d.tif")
    site.map(a="P1", b="P1", c="P2", d="P2")
    site.scan(executor=Backwards())
    with SiteStore(site.folder.parent / "other.db") as other:
        scan(other, site.folder, site.list, PLAN, KEY, now=7.0)
        assert other.cohort(scan_key(PLAN)).digest == cohort(site).digest


# ---- files that are being written ----


def test_slide_that_changes_while_it_is_read_is_left_for_the_next_scan(site, monkeypatch):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    real = vars(scan_reading)["examine"]

    def grows(reader, plan, *, where, **more):
        if where == "a.tif":
            with (site.folder / "a.tif").open("ab") as file:
                file.write(b"more")
        return real(reader, plan, where=where, **more)

    monkeypatch.setattr(scan_reading, "examine", grows)
    report = site.scan()
    assert report.left == ("a.tif",)
    assert (report.patients, site.statuses()["a.tif"][0]) == (1, SlideStatus.PENDING)
    monkeypatch.undo()
    assert site.scan().patients == 2


def test_slide_is_read_once_it_has_been_at_rest(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    os.utime(site.folder / "a.tif", (0, 0))
    ahead = time.time() + 3600
    os.utime(site.folder / "b.tif", (ahead, ahead))  # the share's clock is ahead
    memory = ScanMemory(settling=Settling(seconds=30))
    assert site.scan(memory=memory).left == ("b.tif",)
    assert list(site.statuses()) == ["a.tif"]
    (slide,) = memory.settling._seen
    state, since = memory.settling._seen[slide]
    memory.settling._seen[slide] = (state, since - 31)
    assert site.scan(memory=memory).left == ()
    assert site.statuses() == {"a.tif": USED, "b.tif": USED}
