import json
import logging
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from pathfed_client.cohort.patient_list import pseudonym
from pathfed_client.io import scan_reading, site_cohort
from pathfed_client.io.scan import CohortEmptyError, ScanEndedError, scan
from pathfed_client.io.site_records import SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.tile_index import TileIndex, index_file
from pathfed_client.slides.tiling import scan_key
from pathfed_common.cohort_rules import CohortExclude, CohortInclude, TileWeight
from pathfed_common.errors import ErrorCode, HostError, SiteDataError
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan(tile_px=224)
KEY = bytes(range(32))  # of the site, see conftest.py


def test_patients_gather_the_tiles_of_all_their_slides(site):
    site.add("a.tif", "b.tif", "deep/c.tif")
    site.map(a="P1", b="P2", c="P1")
    calls = []
    report = site.scan(progress=lambda done, total: calls.append((done, total)))
    cohort = site.store.cohort(scan_key(PLAN))
    assert (report.patients, report.tiles, report.slides_read) == (2, 18, 3)
    assert {patient.pseudonym: patient.tile_count for patient in cohort.patients} == {pseudonym(KEY, "P1"): 12, pseudonym(KEY, "P2"): 6}
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert site.store.events()[-1].kind == "scan"


def test_unchanged_slides_are_not_read_again_and_the_cohort_stays(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    site.scan()
    before = site.store.cohort(scan_key(PLAN)).digest
    report = site.scan()
    assert report.slides_read == 0
    assert (report.patients, report.tiles) == (2, 12)
    assert site.store.cohort(scan_key(PLAN)).digest == before


def test_changed_slide_is_read_again_under_a_new_number(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    site.scan()
    before = site.store.cohort(scan_key(PLAN)).digest
    site.write_slide(site.folder / "a.tif", shift=400)
    assert site.scan().slides_read == 1
    assert site.store.cohort(scan_key(PLAN)).digest != before


def test_plans_with_other_tiles_are_scanned_apart(site):
    site.add("a.tif")
    site.map(a="P1")
    site.scan()
    other = CohortPlan(tile_px=96, play_px=0)
    assert site.scan(other).slides_read == 1
    assert site.store.cohort(scan_key(PLAN)).patients[0].tile_count == 6
    assert site.store.cohort(scan_key(other)).patients[0].tile_count == 48
    assert site.scan(CohortPlan(tiles_per_patient=2)).slides_read == 0


def test_unmapped_slides_are_listed_and_never_read(site, monkeypatch):
    site.add("a.tif")
    site.map(a="P1")
    (site.folder / "stray.svs").write_bytes(b"would not open")
    report = site.scan()
    assert site.statuses()["stray.svs"] == (SlideStatus.UNMAPPED, ErrorCode.SLIDE_UNMAPPED)
    assert report.slides_read == 1
    assert report.by_status == {SlideStatus.USABLE: 1, SlideStatus.UNMAPPED: 1}


def test_list_changes_take_effect_without_reading_slides(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    site.scan()
    site.map(a="P2")
    report = site.scan()
    assert report.slides_read == 0
    assert site.statuses()["b.tif"] == (SlideStatus.UNMAPPED, ErrorCode.SLIDE_UNMAPPED)
    assert [patient.pseudonym for patient in site.store.cohort(scan_key(PLAN)).patients] == [pseudonym(KEY, "P2")]
    site.map(a="P2", b="P3")
    assert site.scan().slides_read == 0
    assert len(site.store.cohort(scan_key(PLAN)).patients) == 2


def test_removed_slide_leaves_the_cohort_and_comes_back_unread(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    site.scan()
    (site.folder / "b.tif").rename(site.folder / "b.away")
    report = site.scan()
    assert site.statuses()["b.tif"] == (SlideStatus.MISSING, ErrorCode.SLIDE_MISSING)
    assert report.patients == 1
    assert [(row.slide, row.line, row.code) for row in report.not_found] == [("b.tif", 3, ErrorCode.SLIDE_MISSING)]
    assert [(patient.lines, patient.code) for patient in report.patients_without_tile] == [((3,), ErrorCode.PATIENT_WITHOUT_TILE)]
    (site.folder / "b.away").rename(site.folder / "b.tif")
    report = site.scan()
    assert (report.patients, report.slides_read) == (2, 0)


def glass() -> np.ndarray:
    return np.random.default_rng(0).integers(238, 247, (512, 512, 3), dtype=np.uint8)


def test_bad_slides_get_their_reason_and_stop_nothing(site, tissue):
    site.add("a.tif", "z.tif")
    (site.folder / "b.tif").write_bytes(b"no slide")
    site.write_slide(site.folder / "c.tif", mpp=28.97)
    site.write_slide(site.folder / "d.tif", glass())
    site.write_slide(site.folder / "e.tif", tissue // 8)
    site.write_slide(site.folder / "f.tif", np.full((512, 512, 3), 200, np.uint8))
    site.write_slide(site.folder / "g.tif", mpp=1.0)
    site.map(**{name: f"P{name}" for name in "abcdefgz"})
    report = site.scan()
    assert {path: reason for path, (_, reason) in site.statuses().items()} == {
        "a.tif": None,
        "b.tif": ErrorCode.SLIDE_UNOPENABLE,
        "c.tif": ErrorCode.SLIDE_MPP_UNUSABLE,
        "d.tif": ErrorCode.SLIDE_WITHOUT_TISSUE,
        "e.tif": ErrorCode.SLIDE_NOT_BRIGHTFIELD,
        "f.tif": ErrorCode.SLIDE_UNREADABLE,
        "g.tif": ErrorCode.SLIDE_MPP_UNUSABLE,
        "z.tif": None,
    }
    assert report.by_status == {SlideStatus.USABLE: 2, SlideStatus.REFUSED: 6}
    assert report.by_reason[ErrorCode.SLIDE_MPP_UNUSABLE] == 2
    assert [patient.lines for patient in report.patients_without_tile] == [(3,), (4,), (5,), (6,), (7,), (8,)]
    again = site.scan()
    assert again.slides_read == 2, "those that could not be opened or read are tried again"
    assert again.slides == report.slides


def test_slide_with_tissue_that_cannot_be_decoded_is_unreadable(site, break_tile, write_slide):
    site.add("a.tif", "b.tif")
    for tile in (0, 1, 2, 3, 4, 6, 7, 8):
        break_tile(site.folder / "b.tif", tile)
    site.map(a="P1", b="P2")
    site.scan()
    assert site.statuses()["b.tif"] == (SlideStatus.REFUSED, ErrorCode.SLIDE_UNREADABLE)


@pytest.mark.parametrize("failure", [MemoryError("out"), OSError(5, "I/O error"), ValueError("odd"), ZeroDivisionError("odd")])
def test_what_decoders_raise_stops_one_slide_only(site, monkeypatch, failure):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    real = vars(scan_reading)["examine"]

    def fails_on_a(reader, plan, *, where, **more):
        if where == "a.tif":
            raise failure
        return real(reader, plan, where=where, **more)

    monkeypatch.setattr(scan_reading, "examine", fails_on_a)
    site.scan()
    assert site.statuses() == {"a.tif": (SlideStatus.REFUSED, ErrorCode.SLIDE_UNREADABLE), "b.tif": (SlideStatus.USABLE, None)}
    monkeypatch.undo()
    assert site.scan().by_status == {SlideStatus.USABLE: 2}


KILLED = """
import os, signal, sys
from pathlib import Path
from pathfed_client.io.scan import scan
from pathfed_client.io.site_store import SiteStore
from pathfed_common.plan import CohortPlan

home = Path(sys.argv[1])
kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 2 else None
with SiteStore(home / "site.db") as store:
    scan(store, home / "slides", home / "patients.csv", CohortPlan(tile_px=224), bytes(range(32)), kill)
"""


def test_killed_scan_goes_on_where_it_was(site, tmp_path):
    site.add("a.tif", "b.tif", "c.tif", "d.tif")
    site.map(a="P1", b="P2", c="P3", d="P4")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert site.done() == ["a.tif", "b.tif"]
    assert site.scan().slides_read == 2
    with SiteStore(tmp_path / "other.db") as undisturbed:
        scan(undisturbed, site.folder, site.list, PLAN, KEY, now=7.0)
        assert undisturbed.cohort(scan_key(PLAN)).digest == site.store.cohort(scan_key(PLAN)).digest


def test_full_disk_stops_the_scan_and_keeps_what_was_done(site):
    names = [f"s{number:02d}" for number in range(30)]
    site.add("s00.tif")
    for name in names[1:]:
        (site.folder / f"{name}.tif").write_bytes((site.folder / "s00.tif").read_bytes() + name.encode())
    site.map(**dict.fromkeys(names, "P1"))

    def limit(pages: str) -> None:
        with site.store._engine.connect() as connection:  # the pool hands the next write this connection
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    with pytest.raises(HostError, match="PF901"):
        site.scan(progress=lambda done, total: limit("1"))  # no page more than there are
    kept = [record for record in site.store.slides(scan_key(PLAN)).values() if record.status is not SlideStatus.PENDING]
    assert 0 < len(kept) < 30
    assert {(record.status, record.tile_count) for record in kept} == {(SlideStatus.USABLE, 6)}
    limit("1000000")
    report = site.scan()
    assert report.by_status == {SlideStatus.USABLE: 30}
    assert report.slides_read == 30 - len(kept)


@pytest.mark.parametrize("folder", ["slides", "gone"])
def test_empty_or_missing_folder_is_refused(site, folder):
    site.map(a="P1")
    with pytest.raises(SiteDataError, match="PF201"):
        scan(site.store, site.folder.parent / folder, site.list, PLAN, KEY, now=7.0)


def test_missing_patient_list_is_refused(site):
    site.add("a.tif")
    with pytest.raises(SiteDataError, match="PF202"):
        site.scan()
    assert site.statuses() == {}


def test_nothing_to_train_on_is_an_error_that_carries_the_report(site):
    site.write_slide(site.folder / "a.tif", mpp=28.97)
    site.add("b.tif")
    site.map(a="P1")
    with pytest.raises(CohortEmptyError, match=r"PF211.*PF204 x 1, PF207 x 1") as caught:
        site.scan()
    assert len(caught.value.report.slides) == 2
    assert len(site.statuses()) == 2
    assert site.store.events()[-1].code == ErrorCode.COHORT_EMPTY


def test_report_can_be_printed_as_json(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", gone="P9")
    report = json.loads(json.dumps(site.scan().to_dict()))
    assert report["by_status"] == {"usable": 1, "unmapped": 1}
    assert report["by_reason"] == {"PF204": 1}
    assert report["not_found"][0]["line"] == 3
    assert report["slides"][0] == {"path": "a.tif", "status": "usable", "reason": None, "detail": None, "tiles": 6}


def test_logs_above_debug_name_no_slide_and_no_patient(site, caplog):
    caplog.set_level(logging.DEBUG)
    site.add("a-secret.tif")
    (site.folder / "b-secret.tif").write_bytes(b"no slide")
    site.map(**{"a-secret": "MRN-SECRET", "b-secret": "MRN-SECRET-2"})
    site.scan()
    spoken = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert spoken
    assert not [line for line in spoken if "secret" in line.lower()]
    assert "SECRET" not in caplog.text
    stored = b"".join(path.read_bytes() for path in site.store.path.parent.glob("site.db*"))
    assert b"MRN-SECRET" not in stored


def test_records_survive_as_they_were_scanned(site):
    site.add("a.tif")
    site.map(a="P1")
    site.scan()
    (record,) = site.store.slides(scan_key(PLAN)).values()
    assert (record.mpp, record.width, record.height, record.tile_count) == (0.5, 768, 640, 6)
    assert record == replace(record, status=SlideStatus.USABLE, patient=pseudonym(KEY, "P1"))


# Lists in doubt: the slides concerned are out, the rest is scanned, and the scan ends with an error


@pytest.mark.parametrize(
    ("lines", "code", "numbers"),
    [
        (("a.tif,P1,", "b.tif,P2,", "a.tif,P3,"), ErrorCode.SLIDE_LISTED_TWICE, (2, 4)),
        (("a.tif,P1,lung", "b.tif,P2,", "a,P1,liver"), ErrorCode.SLIDE_LINES_CONFLICT, (2, 4)),
        (("b.tif,P2,", "a.tif,,"), ErrorCode.LIST_LINE_UNUSABLE, (3,)),
    ],
)
def test_a_slide_in_doubt_is_out_unread_the_rest_is_kept_and_the_scan_ends_with_the_code(site, lines, code, numbers):
    site.add("a.tif", "b.tif")
    site.write_list("slide,patient,organ", *lines)
    with pytest.raises(ScanEndedError) as caught:
        site.scan()
    report = caught.value.report
    assert caught.value.code is code
    assert all(str(number) in str(caught.value.where) for number in numbers)
    assert [(one.code, one.lines) for one in report.list_findings] == [(code, numbers)]
    assert site.statuses() == {"a.tif": (SlideStatus.UNMAPPED, code), "b.tif": (SlideStatus.USABLE, None)}
    assert (report.slides_read, report.patients) == (1, 1)
    assert site.store.events()[-1].code == code
    json.dumps(report.to_dict())
    site.map(a="P1", b="P2")
    assert (site.scan().slides_read, site.statuses()["a.tif"]) == (1, (SlideStatus.USABLE, None))


def test_a_usable_slide_that_comes_into_doubt_leaves_the_cohort_without_being_read(site):
    site.add("a.tif", "b.tif")
    site.map(a="P1", b="P2")
    site.scan()
    site.write_list("slide,patient", "a.tif,P1", "a.tif,P2", "b.tif,P2")
    with pytest.raises(ScanEndedError, match="PF203") as caught:
        site.scan()
    assert (caught.value.report.slides_read, caught.value.report.patients) == (0, 1)
    assert site.statuses()["a.tif"] == (SlideStatus.UNMAPPED, ErrorCode.SLIDE_LISTED_TWICE)


def test_what_is_wrong_with_the_list_is_told_before_what_follows_from_it(site):
    site.add("a.tif")
    site.write_list("slide,patient", "a.tif,P1", "a.tif,P2")
    with pytest.raises(ScanEndedError, match="PF203"):
        site.scan()


def test_an_ambiguous_line_has_its_code_and_is_no_error(site):
    site.add("x/a.tif", "y/a.tif", "b.tif")
    site.map(a="P1", b="P2")
    report = site.scan()
    assert [(row.line, row.code) for row in report.not_found] == [(2, ErrorCode.SLIDE_AMBIGUOUS)]
    assert site.statuses()["x/a.tif"] == (SlideStatus.UNMAPPED, ErrorCode.SLIDE_UNMAPPED)


# Attributes and cohort rules


def cohort(site, plan):
    return site_cohort.cohort(site.store, plan, KEY, site.store.withdrawn())


def test_other_rules_and_other_attributes_read_no_slide_and_change_the_cohort(site):
    site.add("a.tif", "b.tif", "c.tif")
    site.write_list("slide,patient,organ", "a.tif,P1,Lung", "b.tif,P2,Liver", "c.tif,P3,")
    site.scan()
    lung = CohortPlan(tile_px=224, include=CohortInclude(organ=("LUNG",)))
    report = site.scan(lung)
    assert (report.slides_read, report.patients) == (0, 1)
    assert {one.path: one.reason for one in report.slides} == {
        "a.tif": None,
        "b.tif": ErrorCode.SLIDE_OUTSIDE_RULES,
        "c.tif": ErrorCode.SLIDE_OUTSIDE_RULES,
    }
    assert [one.detail for one in report.slides if one.detail] == ["organ: liver", "organ: not known"]
    assert site.scan().patients == 3, "the other plan's cohort is as it was"
    assert [patient.pseudonym for patient in cohort(site, lung).patients] == [pseudonym(KEY, "P1")]
    before = cohort(site, lung).digest
    site.write_list("slide,patient,organ", "a.tif,P1,Lung", "b.tif,P2,Lung", "c.tif,P3,")
    report = site.scan(lung)
    assert (report.slides_read, report.patients) == (0, 2)
    assert cohort(site, lung).digest != before


def test_a_plan_whose_rules_leave_nothing_is_told(site):
    site.add("a.tif")
    site.map(a="P1")
    with pytest.raises(CohortEmptyError, match=r"PF211.*PF233 x 1"):
        site.scan(CohortPlan(tile_px=224, exclude=CohortExclude(stain=("ihc",))))


def test_weights_reach_the_cohort_and_its_digest(site):
    site.add("a.tif", "b.tif")
    site.write_list("slide,patient,stain", "a.tif,P1,HE", "b.tif,P1,IHC")
    plan = CohortPlan(tile_px=224, tile_weights=(TileWeight(attribute="stain", value="ihc", weight=0.25),))
    site.scan(plan)
    (patient,) = cohort(site, plan).patients
    assert [slide.weight for slide in patient.slides] == [1.0, 0.25]
    assert cohort(site, plan).digest != cohort(site, PLAN).digest


# Resolutions from the list


def test_a_resolution_in_the_list_mends_a_file_and_a_change_of_it_reads_the_slide_again(site):
    site.write_slide(site.folder / "a.tif", mpp=28.97)
    site.write_slide(site.folder / "b.tif", mpp=28.97, shift=50)
    site.write_list("slide;patient;scanner;mpp", "*;;S1;0,5", "a.tif;P1;S1;", "b.tif;P2;;0.25")
    assert site.scan().patients == 2
    by_path = {record.path: record for record in site.store.slides(scan_key(PLAN)).values()}
    with TileIndex(index_file(site.store.tile_folder, scan_key(PLAN))) as index:
        grids = {path: (record.mpp, index.read(record.tiles).grid) for path, record in by_path.items()}
    sides = {path: (mpp, grid.crop * grid.downsample) for path, (mpp, grid) in grids.items()}
    assert sides == {"a.tif": (0.5, 224), "b.tif": (0.25, 448)}, "level-0 pixels of a tile"
    assert site.scan().slides_read == 0
    before = cohort(site, PLAN)
    site.write_list("slide;patient;scanner;mpp", "*;;S1;0.49", "a.tif;P1;S1;", "b.tif;P2;;0.25")
    assert site.scan().slides_read == 1
    after = cohort(site, PLAN)
    numbers = [{slide.slide for patient in made.patients for slide in patient.slides} for made in (before, after)]
    assert len(numbers[0] - numbers[1]) == 1, "other pixels under old corners are another slide"
    site.map(a="P1", b="P2")
    with pytest.raises(CohortEmptyError, match="PF207 x 2"):
        site.scan()


def test_an_implausible_resolution_in_the_list_refuses_its_line_alone(site):
    site.add("a.tif", "b.tif")
    site.write_list("slide,patient,mpp", "a.tif,P1,352.8", "b.tif,P2,")
    with pytest.raises(ScanEndedError, match=r"PF232.*line 2"):
        site.scan()
    assert site.statuses() == {"a.tif": (SlideStatus.UNMAPPED, ErrorCode.LIST_LINE_UNUSABLE), "b.tif": (SlideStatus.USABLE, None)}


def test_configured_columns_reach_the_scan(site):
    site.add("a.tif")
    site.write_list("Objekt,Fall", "a,F1")
    with pytest.raises(SiteDataError, match=r"PF202.*not found"):
        site.scan()
    assert site.scan(columns={"slide": "Objekt", "patient": "Fall"}).patients == 1
