import os

import numpy as np
import pytest

from pathfed_client.cohort.cohort import SlideId, TileRef
from pathfed_client.io import tile_stream
from pathfed_client.io.scan import scan
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.tile_index import index_file
from pathfed_client.io.tile_stream import TileStream
from pathfed_client.slides.tiling import scan_key
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan(tile_px=96, play_px=0, tissue_share=0.1)


@pytest.fixture
def site(tmp_path, write_slide):
    """A scanned site of three one-slide patients; the second slide is at 0.25 um/px."""
    folder = tmp_path / "slides"
    for number, mpp in enumerate((0.5, 0.25, 0.5)):
        write_slide(folder / f"{number}.tif", mpp=mpp, shift=50 * number)
    (tmp_path / "patients.csv").write_text("slide,patient\n0.tif,A\n1.tif,B\n2.tif,C\n")
    with SiteStore(tmp_path / "site.db") as store:
        scan(store, folder, tmp_path / "patients.csv", PLAN, bytes(32), now=0.0)
        yield store, folder


def refs_by_path(store) -> dict[str, list[TileRef]]:
    names = {number: record.path for number, record in store.slides(scan_key(PLAN)).items()}
    refs = {}
    for patient in store.cohort(scan_key(PLAN)).patients:
        for index in range(patient.tile_count):
            refs.setdefault(names[patient.tile(index).slide], []).append(patient.tile(index))
    return refs


def corner(ref: TileRef, columns: int, side: int) -> tuple[int, int]:
    """Level-0 corner of a tile of a slide that is tissue throughout."""
    return ref.tile % columns * side, ref.tile // columns * side


def test_tiles_come_in_order_from_where_they_lie(site, tissue):
    store, folder = site
    refs = refs_by_path(store)["0.tif"]
    assert len(refs) == (768 // 96) * (640 // 96)
    with TileStream(store, folder, PLAN) as stream:
        tiles = stream.read(refs)
    assert tiles.shape == (len(refs), 96, 96, 3)
    assert tiles.dtype == np.uint8
    for ref, tile in zip(refs, tiles, strict=True):
        x, y = corner(ref, 8, 96)
        assert np.abs(tile.astype(float) - tissue[y : y + 96, x : x + 96]).mean() < 10


def test_finer_slide_is_brought_to_the_plans_resolution(site, tissue):
    store, folder = site
    ref = refs_by_path(store)["1.tif"][1]
    with TileStream(store, folder, PLAN) as stream:
        (tile,) = stream.read([ref])
    x, y = corner(ref, 4, 192)
    wide = np.roll(tissue, 50, axis=1)[y : y + 192, x : x + 192].astype(float)
    assert tile.shape == (96, 96, 3)
    assert np.abs(tile - wide.reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))).mean() < 10


def test_equal_references_give_equal_tiles_whatever_is_open(site):
    store, folder = site
    refs = [ref for slide in zip(*refs_by_path(store).values(), strict=False) for ref in slide][:9]
    with TileStream(store, folder, PLAN) as many, TileStream(store, folder, PLAN, open_slides=1) as one:
        first, second = many.read(refs), one.read(refs)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first[::-1], one.read(refs[::-1]))
        assert one._reader.open_slides == 1
        assert many._reader.open_slides == 3


@pytest.mark.parametrize("take_out", [False, True], ids=["nonsense", "missing"])
def test_unreadable_tile_is_left_out_and_never_white(site, break_tile, take_out):
    store, folder = site
    refs = refs_by_path(store)["0.tif"]
    with TileStream(store, folder, PLAN) as stream:
        whole = stream.read(refs)
    before = (folder / "0.tif").stat()
    break_tile(folder / "0.tif", 4, take_out=take_out)
    os.utime(folder / "0.tif", ns=(before.st_atime_ns, before.st_mtime_ns))  # the damage a failing disk does leaves no trace
    with TileStream(store, folder, PLAN) as stream:
        rest = stream.read(refs)
        assert stream.left_out == len(refs) - len(rest) > 0
    corners = [corner(ref, 8, 96) for ref in refs]
    hit = [x + 96 > 256 and x < 512 and y + 96 > 256 and y < 512 for x, y in corners]
    np.testing.assert_array_equal(rest, whole[~np.array(hit)])


def test_a_tile_is_cut_at_the_place_that_was_drawn_inside_its_source(tmp_path, write_slide, tissue):
    plan = CohortPlan(tile_px=224, play_px=32, tissue_share=0.1)
    write_slide(tmp_path / "slides" / "a.tif")
    (tmp_path / "patients.csv").write_text("slide,patient\na.tif,A\n")
    with SiteStore(tmp_path / "site.db") as store:
        scan(store, tmp_path / "slides", tmp_path / "patients.csv", plan, bytes(32), now=0.0)
        (patient,) = store.cohort(scan_key(plan)).patients
        assert patient.tile_count == (768 // 256) * (640 // 256)
        with TileStream(store, tmp_path / "slides", plan) as stream:
            for across, down in ((0.0, 0.0), (0.5, 0.25), (0.999999, 0.999999)):
                (tile,) = stream.read([patient.tile(4, across, down)])
                x, y = 256 + int(across * 33), 256 + int(down * 33)
                assert np.abs(tile.astype(float) - tissue[y : y + 224, x : x + 224]).mean() < 10


def test_damaged_tile_index_costs_that_slide_alone_until_the_next_scan(site):
    store, folder = site
    refs = refs_by_path(store)
    entry = next(record.tiles for record in store.slides(scan_key(PLAN)).values() if record.path == "1.tif")
    index = index_file(store.tile_folder, scan_key(PLAN))
    data = bytearray(index.read_bytes())
    data[entry.offset + 45] ^= 1
    index.write_bytes(data)
    with TileStream(store, folder, PLAN) as stream:
        assert len(stream.read([refs["0.tif"][0], refs["1.tif"][0], refs["2.tif"][0]])) == 2
    report = scan(store, folder, folder.parent / "patients.csv", PLAN, bytes(32), now=1.0)
    assert report.slides_read == 1
    with TileStream(store, folder, PLAN) as stream:
        assert len(stream.read(refs["0.tif"][:1] + refs["1.tif"][:1] + refs["2.tif"][:1])) == 3


def test_tile_of_one_colour_is_left_out(tmp_path, write_slide, tissue):
    pixels = tissue.copy()
    pixels[:112, :112] = (200, 120, 170)
    write_slide(tmp_path / "slides" / "a.tif", pixels)
    (tmp_path / "patients.csv").write_text("slide,patient\na.tif,A\n")
    with SiteStore(tmp_path / "site.db") as store:
        scan(store, tmp_path / "slides", tmp_path / "patients.csv", PLAN, bytes(32), now=0.0)
        with TileStream(store, tmp_path / "slides", PLAN) as stream:
            (patient,) = store.cohort(scan_key(PLAN)).patients
            assert len(stream.read([patient.tile(index) for index in range(patient.tile_count)])) == patient.tile_count - 1


def test_the_stream_knows_a_bounded_number_of_slides_and_never_reads_them_all(site, monkeypatch):
    store, folder = site
    refs = refs_by_path(store)
    monkeypatch.setattr(tile_stream, "_KNOWN", 1)
    monkeypatch.setattr(store, "slides", None)
    with TileStream(store, folder, PLAN) as stream:
        for _ in range(2):
            for name in ("0.tif", "1.tif", "2.tif"):
                assert len(stream.read(refs[name][:1])) == 1
                assert len(stream._records) <= 2


def test_changed_and_vanished_slides_are_left_out(site, write_slide):
    store, folder = site
    refs = refs_by_path(store)
    write_slide(folder / "0.tif", shift=5)
    (folder / "1.tif").unlink()
    with TileStream(store, folder, PLAN) as stream:
        tiles = stream.read([refs["0.tif"][0], refs["1.tif"][0], refs["2.tif"][0]])
        assert len(tiles) == 1
        assert stream.left_out == 2


def test_nothing_readable_is_an_empty_array(site):
    store, folder = site
    with TileStream(store, folder, PLAN) as stream:
        assert stream.read([]).shape == (0, 96, 96, 3)
        assert stream.read([TileRef(SlideId(999), 0), TileRef(SlideId(1), 10**6)]).shape == (0, 96, 96, 3)


def test_running_out_of_memory_leaves_the_tile_out(site, monkeypatch):
    store, folder = site
    refs = refs_by_path(store)["0.tif"][:2]
    with TileStream(store, folder, PLAN) as stream:
        real = stream._reader.read

        def starved(slide, x, y):
            if (x, y) == (0, 0):
                raise MemoryError
            return real(slide, x, y)

        monkeypatch.setattr(stream._reader, "read", starved)
        assert len(stream.read(refs)) == 1
