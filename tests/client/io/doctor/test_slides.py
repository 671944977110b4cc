"""A sample of slides is judged as a scan does, in a process that may die."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.io.doctor.seen import MppState
from pathfed_client.io.doctor.slides import PLACES, Looker, LookTask, draw_sample, look_at, look_at_sample
from pathfed_client.io.slide_files import UNREACHED, SlideFiles
from pathfed_client.io.slide_listing import list_slides
from pathfed_client.io.tile_reader import TileReader
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan(tile_px=224)
#: A process that does something else with the slide of one name.
PLANTED = """
import os, sys, time
from pathfed_client.io.doctor import slides
real = slides.examine
def examine(reader, plan, *, where, **more):
    if where == "b.tif":
        {deed}
    return real(reader, plan, where=where, **more)
slides.examine = examine
slides.check_decoders.__globals__["_checked"] = lambda *_: os._exit(1)
slides.serve(int(sys.argv[1]), lambda work: work())
"""


@pytest.fixture
def tasks(tmp_path, write_slide):
    for number, name in enumerate("abc"):
        write_slide(tmp_path / "slides" / f"{name}.tif", shift=number)
    return [LookTask(slide, PLAN, 0) for slide in list_slides(tmp_path / "slides").slides]


@pytest.fixture
def planted(tmp_path, monkeypatch):
    def plant(deed: str) -> str:
        (tmp_path / "planted_looks.py").write_text(PLANTED.format(deed=deed), encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        return "planted_looks"

    return plant


def test_a_good_slide_gives_places_at_which_tiles_can_be_read(tasks, tmp_path):
    look = look_at(tasks[0])
    assert (look.seen.vendor, look.seen.mpp, look.seen.code, look.seen.direct) == ("generic-tiff", MppState.FINE, None, True)
    assert look.source is not None
    assert 0 < len(look.places) <= PLACES
    with TileReader(tmp_path / "slides") as reader:
        tiles = [reader.read(look.source, *place) for place in look.places]
    assert all(tile is not None and tile.shape == (224, 224, 3) for tile in tiles)
    assert "a.tif" not in repr(look) + repr(tasks[0])


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda path: path.write_bytes(b""), "PF205"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "PF205"),
        (lambda path: path.rename(path.with_suffix(".gone")), "PF205"),
        (lambda path: path.write_bytes(b"no slide" * 999), "PF205"),
    ],
    ids=["empty", "truncated", "gone", "other content"],
)
def test_damaged_slides_have_their_code(tasks, damage, code):
    damage(tasks[0].slide.opened)
    seen = look_at(tasks[0]).seen
    assert (seen.code, seen.vendor, seen.mpp, seen.direct) == (code, None, None, None)


def test_a_slide_whose_tiles_are_nonsense_is_unreadable(tasks, break_tile):
    for tile in range(9):
        break_tile(tasks[0].slide.opened, tile)
    assert look_at(tasks[0]).seen.code == "PF206"


@pytest.mark.parametrize(("mpp", "state"), [(28.97, MppState.IMPLAUSIBLE), (1.0, MppState.COARSE)])
def test_a_bad_resolution_is_told_with_its_kind(tasks, write_slide, mpp, state):
    write_slide(tasks[0].slide.opened, mpp=mpp)
    seen = look_at(tasks[0]).seen
    assert (seen.code, seen.mpp) == ("PF207", state)


def test_real_slides_have_the_codes_of_a_scan(slides_data):
    found = {}
    with Looker() as looker:
        for slide in list_slides(slides_data).slides:
            seen = looker.look(LookTask(slide, PLAN, 0)).seen
            found[Path(slide.path).name] = (seen.vendor, seen.code)
    assert found["histolab_broken.svs"] == (None, "PF205")
    assert found["slideio_corrupted.svs"] == ("generic-tiff", "PF206")
    assert found["google_camelyon_jpeg.dcm"] == ("dicom", "PF207")
    assert found["hamamatsu_test3-DAPI-2-387.ndpi"] == ("hamamatsu", "PF208")
    assert found["CMU-1-Small-Region.svs"] == ("aperio", None)


@pytest.mark.parametrize("deed", ["os.abort()", "os._exit(0)", "raise AssertionError('a bug of ours')"])
def test_a_slide_that_ends_the_process_is_a_finding_and_the_others_are_looked_at(tasks, planted, deed):
    with Looker(module=planted(deed)) as looker:
        codes = [look.seen.code for look in look_at_sample(looker, tasks, within_s=100)]
    assert codes == [None, ErrorCode.SLIDE_CRASHED, None]


def test_a_slide_that_hangs_is_a_finding(tasks, planted):
    with Looker(module=planted("time.sleep(1000)"), timeout_s=0.5) as looker:
        assert looker.look(tasks[1]).seen.code == ErrorCode.SLIDE_TIMEOUT


def test_decoders_that_end_the_process_give_nothing(planted):
    with Looker(module=planted("pass")) as looker:
        assert looker.decoders() == ()
    with Looker() as looker:
        assert len(looker.decoders()) == 4


def test_a_process_that_does_not_start_is_no_slides_fault(tasks):
    with Looker(module="no_such_module_here") as looker, pytest.raises(HostError, match="PF903"):
        looker.look(tasks[0])


def test_no_slide_is_begun_once_time_is_over_but_one_always_is(tasks):
    with Looker() as looker:
        assert len(look_at_sample(looker, tasks, within_s=0)) == 1


def slides(*names: str) -> list[SlideFiles]:
    return [SlideFiles(name, Path("/nowhere"), (), UNREACHED) for name in names]


def test_every_folder_and_kind_of_file_has_its_turn():
    many = slides(*(f"big//{number}.svs" for number in range(500)), "big//x.ndpi", "small//y.svs")
    for seed in range(20):
        drawn = {slide.path for slide in draw_sample(many, 4, seed)}
        assert {"big//x.ndpi", "small//y.svs"} < drawn
    draws = {tuple(slide.path for slide in draw_sample(many, 4, seed)) for seed in range(20)}
    assert len(draws) > 10


@given(st.lists(st.sampled_from("abcdef"), unique=True), st.integers(0, 9), st.integers(0, 99), st.randoms())
def test_a_sample_has_no_slide_twice_and_does_not_depend_on_the_order(names, count, seed, shuffler):
    listed = slides(*(f"{name}.svs" for name in names))
    drawn = draw_sample(listed, count, seed)
    assert len({slide.path for slide in drawn}) == len(drawn) == min(count, len(names))
    shuffler.shuffle(listed)
    assert draw_sample(listed, count, seed) == drawn


def test_a_negative_sample_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        draw_sample([], -1, 0)
