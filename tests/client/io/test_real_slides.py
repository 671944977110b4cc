"""Scanning real slides, good and bad, beside generated ones: every usable slide is indexed, every bad one named with its reason."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.io.scan import scan
from pathfed_client.io.site_records import SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_listing import list_slides
from pathfed_client.io.tile_stream import TileStream
from pathfed_client.slides.tiling import scan_key
from pathfed_common.errors import ErrorCode
from pathfed_common.plan import CohortPlan
from pathfed_local.generator import generate_hospitals

PLAN = CohortPlan()
REFUSED = {
    "bad/histolab_broken.svs": ErrorCode.SLIDE_UNOPENABLE,
    "bad/openslide_unopenable.tiff": ErrorCode.SLIDE_UNOPENABLE,
    "bad/openslide_unreadable.svs": ErrorCode.SLIDE_UNREADABLE,
    "bad/slideio_corrupted.svs": ErrorCode.SLIDE_UNREADABLE,
    "ok/TCGA-CR-7395-01A-01-TS1.svs": ErrorCode.SLIDE_MPP_UNUSABLE,
    "ok/google_camelyon_jpeg.dcm": ErrorCode.SLIDE_MPP_UNUSABLE,
    "ok/philips_like_CMU.tiff": ErrorCode.SLIDE_MPP_UNUSABLE,
    "ok/hamamatsu_test3-DAPI-2-387.ndpi": ErrorCode.SLIDE_NOT_BRIGHTFIELD,
}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory, slides_data):
    """A generated hospital with the real slides copied in; each is a patient, the two conversions of one glass slide share one."""
    out = tmp_path_factory.mktemp("real")
    (made,) = generate_hospitals(out, hospitals=1, patients=2, slides_per_patient=2, side_px=(640, 768))
    for name in ("ok", "bad"):
        shutil.copytree(slides_data / name, made.slides_folder / name)
    with made.patient_list.open("a") as file:
        for number, name in enumerate(sorted(REFUSED)):
            file.write(f"{name},REAL{number}\n")
        file.write("CMU-1-Small-Region.svs,CMU\ndicom_CMU,CMU\n")
    return made


def test_every_usable_slide_is_indexed_and_every_bad_one_named(hospital, tmp_path):
    with SiteStore(tmp_path / "site.db") as store:
        report = scan(store, hospital.slides_folder, hospital.patient_list, PLAN, bytes(32), now=0.0)
        assert {slide.path: slide.reason for slide in report.slides if slide.status is not SlideStatus.USABLE} == REFUSED
        usable = {slide.path: slide.tiles for slide in report.slides if slide.status is SlideStatus.USABLE}
        assert set(usable) == {f"case-a-000{p}-{s}.tif" for p in (1, 2) for s in (1, 2)} | {"ok/CMU-1-Small-Region.svs", "ok/dicom_CMU"}
        assert usable["ok/CMU-1-Small-Region.svs"] == usable["ok/dicom_CMU"]
        assert 35 <= usable["ok/dicom_CMU"] <= 60
        assert report.patients == 3
        assert len(report.patients_without_tile) == len(REFUSED)
        assert report.not_found == report.same_content == ()

        cohort = store.cohort(scan_key(PLAN))
        refs = [patient.tile(index) for patient in cohort.patients for index in range(min(6, patient.tile_count))]
        with TileStream(store, hospital.slides_folder, PLAN) as stream:
            tiles = stream.read(refs)
            assert stream.left_out == 0
    assert tiles.shape == (len(refs), 224, 224, 3)
    coloured = (tiles.max(axis=3).astype(int) - tiles.min(axis=3) > 20).mean(axis=(1, 2))
    assert np.all(coloured > 0.25), "tiles hold stained tissue"


def test_conversions_of_one_slide_give_the_same_tiles(hospital, tmp_path):
    with SiteStore(tmp_path / "site.db") as store:
        scan(store, hospital.slides_folder, hospital.patient_list, PLAN, bytes(32), now=0.0)
        (patient,) = (patient for patient in store.cohort(scan_key(PLAN)).patients if len(patient.slides) == 2 and patient.tile_count > 60)
        first, second = patient.slides
        assert (first.tiles, first.check) == (second.tiles, second.check)
        with TileStream(store, hospital.slides_folder, PLAN) as stream:
            one, other = (stream.read([patient.tile(start + 5)]) for start in (0, first.tiles))
    assert np.abs(one.astype(int) - other).max() <= 2


@pytest.mark.parametrize("spread", [False, True], ids=["one folder", "over folders"])
def test_dicom_series_reads_the_same_however_its_files_lie(slides_data, tmp_path, spread):
    """Of the series' files, one is the slide and the others are label, overview and thumbnail."""
    for number, file in enumerate(sorted((slides_data / "ok" / "dicom_CMU").iterdir())):
        target = tmp_path / "study" / (str(number) if spread else ".") / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (slide,) = list_slides(tmp_path).slides
    assert (slide.path, len(slide.files)) == ("study", 4)
    with (
        OpenSlideReader(slide.opened, name=slide.path, files=slide.files) as reader,
        OpenSlideReader(next((slides_data / "ok" / "dicom_CMU").iterdir()), name="reference") as reference,
    ):
        assert reader.dimensions == reference.dimensions == (2220, 2967)
        np.testing.assert_array_equal(reader.read_region(500, 500, 0, 64, 64), reference.read_region(500, 500, 0, 64, 64))
        links = reader._links
    assert (links is not None) == spread
    assert links is None or not Path(links.name).exists()
