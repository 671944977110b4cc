"""Damaged and hostile slides: each gets its verdict, and whatever tiles come out are what the undamaged slide shows at that place.

What a file holds nothing to check by cannot be noticed: see "What strict decoding does not notice" in docs/decisions/0007-tile-pipeline.md.
The properties below leave out exactly that: a bit inside a native tile's own bytes (that tile may come out with other pixels, its
neighbours may not), and the tags that state colour space and resolution.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damaged_slides import (
    Found,
    Original,
    Site,
    Tiles,
    contents_places,
    flipped,
    found,
    jpeg_claiming,
    original,
    overwritten,
    tag_places,
    with_tag,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_local.generator import slide_bytes

UNOPENABLE, UNREADABLE, EMPTY = ErrorCode.SLIDE_UNOPENABLE, ErrorCode.SLIDE_UNREADABLE, ErrorCode.SLIDE_FOLDER_EMPTY
KINDS = ("painted", "aperio", "jpeg2000", "dicom", "philips")
#: Stated once in a file, with nothing that contradicts a wrong value.
FACTS = ("PhotometricInterpretation", "XResolution", "YResolution", "ResolutionUnit")
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def painted(tissue, tmp_path_factory) -> Original:
    return original("a.tif", slide_bytes(tissue), tmp_path_factory.mktemp("painted"))


@pytest.fixture(scope="module")
def slides(painted, slides_data, tmp_path_factory) -> dict[str, Original]:
    """One slide of each kind that is decoded directly; of the real ones those that state no resolution are given one."""
    ok = slides_data / "ok"
    series = {path.name: path.read_bytes() for path in sorted((ok / "dicom_CMU").iterdir())}
    largest = max(series, key=lambda name: len(series[name]))
    volume = series.pop(largest)
    bare = (ok / "TCGA-CR-7395-01A-01-TS1.svs").read_bytes()
    files = {
        "aperio": ("a.svs", (ok / "CMU-1-Small-Region.svs").read_bytes(), {}),
        "jpeg2000": ("b.svs", bare.replace(b"ICC Profile = IEC 61966", b"MPP = 0.5000|Was 61966X", 1), {}),
        "dicom": ("a.dcm", volume, series),
        "philips": ("a.tiff", (ok / "philips_like_CMU.tiff").read_bytes(), {}),
    }
    made = {kind: original(name, data, tmp_path_factory.mktemp(kind), beside) for kind, (name, data, beside) in files.items()}
    return {"painted": painted, **made}


@pytest.fixture(scope="module")
def readers(slides, tmp_path_factory) -> dict[str, Tiles]:
    return {kind: Tiles(slide, tmp_path_factory.mktemp("tiles")) for kind, slide in slides.items()}


def check(slide: Original, result: Found, codes: set[ErrorCode | None]) -> None:
    assert result.code in codes
    assert result.differing(slide.pixels) == []
    assert (result.code is None) or not result.tiles


# The comparison itself


@pytest.mark.parametrize("kind", KINDS)
def test_undamaged_slides_give_all_their_tiles_and_their_own_pixels(slides, readers, kind):
    places = readers[kind].places[:: 7 if kind == "jpeg2000" else 1]
    result = readers[kind].read(slides[kind].data, places)
    assert result.differing(slides[kind].pixels) == []
    assert len(result.tiles) > 0.5 * len(places)


def test_an_undamaged_slide_is_scanned_and_the_comparison_sees_one_wrong_pixel(painted, tmp_path):
    result = found(tmp_path, painted, painted.data)
    check(painted, result, {None})
    assert len(result.tiles) == 30
    corner, tile = next(iter(result.tiles.items()))
    tile[3, 3, 1] ^= 1
    assert result.differing(painted.pixels) == [corner]


# Truncated


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.69, 0.75, 0.9, 0.99])
def test_a_truncated_slide_has_a_code_or_the_tiles_that_are_left(painted, tmp_path, share):
    data = painted.data[: int(share * len(painted.data))]
    check(painted, found(tmp_path, painted, data), {UNOPENABLE, UNREADABLE})


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.98])
@pytest.mark.parametrize("kind", ["aperio", "dicom"])
def test_a_truncated_real_slide_has_a_code_and_no_tile(slides, tmp_path, kind, share):
    slide = replace(slides[kind], beside={})
    check(slide, found(tmp_path, slide, slide.data[: int(share * len(slide.data))]), {UNOPENABLE, UNREADABLE})


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_after_its_scan_a_slide_keeps_only_whole_tiles(slides, readers, kind):
    slide = slides[kind]
    for share in (0.1, 0.4, 0.6, 0.8, 0.95):
        data = slide.data[: int(share * len(slide.data))]
        assert readers[kind].read(data).differing(slide.pixels) == []


def test_a_slide_that_begins_with_its_tables_keeps_the_tiles_before_the_cut(slides, readers):
    slide, tiles = slides["dicom"], readers["dicom"]
    middle = slide.tiles[len(slide.tiles) // 2][0]
    assert 0 < len(tiles.read(slide.data[:middle]).tiles) < len(tiles.read(slide.data).tiles)


# Bits


@settings(FEW, max_examples=50)
@given(draw=st.data())
def test_a_bit_flipped_in_the_table_of_contents_moves_no_tile(painted, tmp_path_factory, draw):
    """Header, directories, and tables of tiles: a scan refuses the slide, or its tiles are where they were."""
    facts = tag_places(painted.data, *FACTS)
    place = draw.draw(st.sampled_from([place for place in contents_places(painted.data) if place not in facts]))
    data = flipped(painted.data, place, draw.draw(st.integers(0, 7)))
    assert found(tmp_path_factory.mktemp("flip"), painted, data).differing(painted.pixels) == []


@pytest.mark.parametrize("kind", ["painted", "philips"])
def test_a_bit_flipped_in_the_table_of_contents_after_the_scan_moves_no_tile(slides, readers, kind):
    slide, tiles = slides[kind], readers[kind]
    facts = tag_places(slide.data, *FACTS)
    places = [place for place in contents_places(slide.data) if place not in facts]

    @FEW
    @given(place=st.sampled_from(places), bit=st.integers(0, 7), corner=st.sampled_from(tiles.places))
    def holds(place, bit, corner):
        assert tiles.read(flipped(slide.data, place, bit), [corner]).differing(slide.pixels) == []

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_flipped_in_one_native_tile_touches_no_other(slides, readers, kind):
    slide, tiles = slides[kind], readers[kind]

    @FEW
    @given(number=st.integers(0, len(slide.tiles) - 1), share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def holds(number, share, bit):
        start, end = slide.tiles[number]
        near = tiles.touching(number)
        others = [place for place in tiles.places if place not in near][:: max(1, len(tiles.places) // 6)]
        result = tiles.read(flipped(slide.data, start + int(share * (end - start)), bit), others + near[:1])
        assert set(result.differing(slide.pixels)) <= set(near)

    holds()


# Lost and overwritten bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["zeros", "ones", "another file"])
def test_a_native_tile_whose_end_was_overwritten_is_left_out(slides, readers, kind, by):
    """What a failing disk or a broken copy leaves: a stretch of zeros, or of something else."""
    slide, tiles = slides[kind], readers[kind]
    for number in range(0, len(slide.tiles), max(1, len(slide.tiles) // 5)):
        start, end = slide.tiles[number]
        middle = start + (end - start) // 3
        filler = {"zeros": b"\0", "ones": b"\xff", "another file": b"Lorem ipsum. "}[by] * (end - middle)
        result = tiles.read(overwritten(slide.data, middle, filler[: end - middle]), tiles.touching(number))
        assert result.tiles == {}


@pytest.mark.parametrize("offset", [0, 8, 2**31, 2**32 - 1])
@pytest.mark.parametrize("where", ["before the scan", "after it"])
def test_tile_offsets_that_point_nowhere_cost_their_tile(painted, readers, tmp_path, offset, where):
    data = with_tag(painted.data, "TileOffsets", offset)
    if where == "after it":
        result = readers["painted"].read(data)
        assert set(result.tiles) == set(readers["painted"].places) - set(readers["painted"].touching(0))
    else:
        result = found(tmp_path, painted, data)
        assert not set(result.tiles) & set(readers["painted"].touching(0))
    assert result.differing(painted.pixels) == []


@pytest.mark.parametrize("size", [0, 1, 2**26 + 1, 2**32 - 1])
def test_tile_lengths_that_cannot_be_cost_their_tile(painted, readers, tmp_path, size):
    data = with_tag(painted.data, "TileByteCounts", size)
    for result in (readers["painted"].read(data), found(tmp_path, painted, data)):
        assert not set(result.tiles) & set(readers["painted"].touching(0))
        assert len(result.tiles) >= 20
        assert result.differing(painted.pixels) == []


@pytest.mark.parametrize("count", [1, 8, 10, 10**6])
@pytest.mark.parametrize("tag", ["TileOffsets", "TileByteCounts"])
def test_a_table_of_the_wrong_length_is_refused(painted, tmp_path, tag, count):
    check(painted, found(tmp_path, painted, with_tag(painted.data, tag, count, entry="count")), {UNOPENABLE, UNREADABLE})


def test_a_slide_of_another_width_than_its_table_has_room_for_is_refused(painted, tmp_path):
    """Its tiles would be laid out in other rows: right pixels, wrong places."""
    for width in (300, 768 + 256):
        check(painted, found(tmp_path / str(width), painted, with_tag(painted.data, "ImageWidth", width)), {UNOPENABLE, UNREADABLE})


def test_one_damaged_tile_does_not_send_the_slide_to_the_lenient_decoder(painted, readers, tmp_path):
    """OpenSlide makes up pixels where ours refuses; the first tile is one of those that are compared."""
    data = _refused_by_ours_alone(painted, readers["painted"], tmp_path / "tried")
    result = found(tmp_path, painted, data)
    check(painted, result, {None})
    assert set(result.tiles) == set(readers["painted"].places) - set(readers["painted"].touching(0))


def _refused_by_ours_alone(slide: Original, tiles: Tiles, folder: Path) -> bytes:
    """A bit flipped in the first native tile, such that OpenSlide gives other pixels and direct decoding nothing."""
    start, end = slide.tiles[0]
    wide, high = slide.tile_size
    for place in range(start + (end - start) // 2, end, 61):
        data = flipped(slide.data, place, 3)
        if not tiles.read(data, tiles.touching(0)[:1]).tiles:
            with OpenSlideReader(slide.write(folder, data), name="tried") as reader, contextlib.suppress(SiteDataError):
                if not np.array_equal(reader.read_region(0, 0, 0, wide, high), slide.pixels[:high, :wide]):
                    return data
    raise AssertionError("no such bit was found")


def test_a_native_tile_of_another_size_is_left_out(painted, readers, tmp_path, tissue):
    small = original("s.tif", slide_bytes(tissue[:128, :128]), tmp_path)
    start, end = small.tiles[0]
    for data in (
        overwritten(painted.data, painted.tiles[4][0], jpeg_claiming(small.data[start:end], 128, 128)),
        overwritten(painted.data, painted.tiles[4][0], jpeg_claiming(painted.data[slice(*painted.tiles[4])], 240, 256)),
    ):
        result = readers["painted"].read(data)
        assert not set(result.tiles) & set(readers["painted"].touching(4))
        assert result.differing(painted.pixels) == []


def test_missing_frames_are_refused(slides, tmp_path):
    """A DICOM file that states fewer or more frames than its picture has places."""
    slide = replace(slides["dicom"], beside={})
    at = slide.data.find(b"\x28\x00\x08\x00IS")
    assert slide.data[at + 8 : at + 11] == b"130"
    for stated in (b"129", b"131"):
        check(slide, found(tmp_path / stated.decode(), slide, overwritten(slide.data, at + 8, stated)), {UNOPENABLE, UNREADABLE})


# Not what its name says


def test_a_wrong_suffix_gets_a_code_or_the_slide_that_it_is(painted, slides, tmp_path):
    jpeg = painted.data[slice(*painted.tiles[0])]
    for number, (name, data) in enumerate(
        (("a.svs", jpeg), ("a.svs", b"no slide at all\n" * 99), ("a.tif", b""), ("a.dcm", b""), ("a.mrxs", jpeg), ("a.ndpi", b"II*\0"))
    ):
        slide = replace(painted, name=name)
        check(slide, found(tmp_path / str(number), slide, data), {UNOPENABLE, EMPTY})
    for kind, name in (("aperio", "a.dcm"), ("dicom", "a.svs")):
        renamed = replace(slides[kind], name=name, beside={})
        result = found(tmp_path / kind, renamed, renamed.data)
        check(renamed, result, {None})
        assert len(result.tiles) > 200


# Bombs, in a process whose memory is watched


@pytest.fixture(scope="module")
def bombs(painted, slides) -> dict[str, tuple[str, bytes]]:
    """Files that claim more than they hold: name and bytes of each."""
    data, dicom, jpeg2000 = painted.data, slides["dicom"].data, slides["jpeg2000"]
    loop = bytearray(data)
    first = int.from_bytes(data[4:8], "little")
    link = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    loop[link : link + 4] = data[4:8]
    all_tiles, codestream = data, jpeg2000.data
    for start, end in painted.tiles:
        all_tiles = overwritten(all_tiles, start, jpeg_claiming(data[start:end], 65500, 65500))
    for start, _ in jpeg2000.tiles:
        assert codestream[start : start + 4] == b"\xff\x4f\xff\x51"
        codestream = overwritten(codestream, start + 8, (65500).to_bytes(4, "big") * 2)
    frames = dicom.find(b"\x28\x00\x08\x00IS")
    wide, high = (dicom.find(b"\x48\x00" + number + b"\x00UL\x04\x00") + 8 for number in (b"\x06", b"\x07"))
    huge = with_tag(with_tag(_long(data, "ImageWidth"), "ImageWidth", 2**31 - 1), "ImageLength", 2**16 - 1)
    return {
        "tiff of 2^31 pixels": ("a.tif", huge),
        "tiff whose tiles state 65500 x 65500": ("a.tif", all_tiles),
        "jpeg 2000 tiles that state 65500 x 65500": ("a.svs", codestream),
        "dicom of 9999 frames": ("a.dcm", overwritten(dicom, frames + 8, b"9999")),
        "dicom of 2^31 pixels": ("a.dcm", overwritten(overwritten(dicom, wide, b"\xff\xff\xff\x7f"), high, b"\xff\xff\xff\x7f")),
        "directories in a circle": ("a.tif", bytes(loop)),
        "a table of 2^31 tiles": ("a.tif", with_tag(data, "TileOffsets", 2**31 - 1, entry="count")),
        "a million pixels wide, tables to match": ("a.tif", with_tag(_long(data, "ImageWidth"), "ImageWidth", 2**20)),
    }


def _long(data: bytes, tag: str) -> bytes:
    """The tag's 16-bit number as a 32-bit one."""
    place = min(tag_places(data, tag))
    return overwritten(data, place + 2, b"\4\0\1\0\0\0" + data[place + 8 : place + 10] + b"\0\0")


_SCANNER = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
from damaged_slides import Site
codes = {}
for home in sorted(Path(sys.argv[2]).iterdir()):
    (slide,) = (home / "slides").iterdir()
    with Site(home) as site:
        code = site.scan(slide.name)
        codes[home.name] = [code, len(site.tiles())]
# Not getrusage: its peak begins with that of the process which started this one.
(peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(json.dumps({"codes": codes, "peak_mb": int(peak) / 1024}))
"""


def test_bombs_get_a_code_in_bounded_memory_and_time(bombs, tmp_path):
    for what, (name, data) in bombs.items():
        (tmp_path / what / "slides").mkdir(parents=True)
        (tmp_path / what / "slides" / name).write_bytes(data)
    command = [sys.executable, "-c", _SCANNER, json.dumps(sys.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["codes"]) == set(bombs)
    assert {what: code for what, (code, _) in told["codes"].items() if code not in (UNOPENABLE, UNREADABLE)} == {}
    assert [what for what, (_, tiles) in told["codes"].items() if tiles] == []
    assert told["peak_mb"] < 1000


def test_a_tile_that_states_65500_pixels_is_left_out_and_the_rest_is_read(slides, readers):
    for kind, place in (("painted", None), ("jpeg2000", 8)):
        slide, tiles, number = slides[kind], readers[kind], len(slides[kind].tiles) // 2
        start, end = slide.tiles[number]
        claim = jpeg_claiming(slide.data[start:end], 65500, 65500) if place is None else b""
        bomb = overwritten(slide.data, start + (place or 0), claim or (65500).to_bytes(4, "big") * 2)
        result = tiles.read(bomb, tiles.places[::9] + tiles.touching(number))
        assert result.tiles
        assert not set(result.tiles) & set(tiles.touching(number))
        assert result.differing(slide.pixels) == []


def test_damage_in_one_slide_leaves_the_others_alone(painted, tmp_path):
    with Site(tmp_path) as site:
        painted.write(site.slides)
        assert site.scan("a.tif") is None
        before = site.tiles()
        (site.slides / "b.tif").write_bytes(painted.data[:5000])
        assert site.scan("a.tif") is None
        after = site.tiles()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[place], after[place]) for place in before)
