"""Finding native tiles in TIFF files, as other programs write them, and in files that lie."""

import io
import struct

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_client.slides.native import Codec, Decoder, LayoutError, NativeLevel, Span
from pathfed_client.slides.tiff_layout import tiff_levels


def reading(data: bytes):
    def read_at(offset: int, size: int) -> bytes:
        if offset < 0 or size < 0:
            raise LayoutError("outside")
        return data[offset : offset + size]

    return read_at


def a_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth, so that JPEG keeps it."""
    ys, xs = np.mgrid[:height, :width] / 40 + seed
    return np.stack([128 + 100 * np.sin(ys + shift) * np.cos(xs - shift) for shift in (0, 1, 2)], 2).astype(np.uint8)


def a_tiff(*pictures: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    more = {key: options.pop(key) for key in ("bigtiff", "byteorder") if key in options}
    with tifffile.TiffWriter(file, **more) as writer:
        for picture in pictures:
            writer.write(picture, **{"tile": (64, 64), "photometric": "rgb", "compression": "jpeg", "metadata": None, **options})
    return file.getvalue()


def decoded(data: bytes, level: NativeLevel) -> np.ndarray:
    """A whole level, native tile by native tile."""
    decoder, read_at = Decoder(level), reading(data)
    rows = []
    for row in range(level.rows):
        tiles = [decoder.decode(read_at(*level.span(row * level.columns + column))).copy() for column in range(level.columns)]
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows, axis=0)[: level.height, : level.width]


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("size", [(64, 64), (100, 200), (300, 129)])
def test_every_level_is_found_and_its_tiles_are_the_picture(bigtiff, byteorder, size):
    pictures = [a_picture(*size), a_picture(size[0] // 2, size[1] // 2)]
    data = a_tiff(*pictures, bigtiff=bigtiff, byteorder=byteorder, compressionargs={"level": 95})
    levels = tiff_levels(reading(data))
    assert [(level.width, level.height) for level in levels] == [picture.shape[1::-1] for picture in pictures]
    for level, picture in zip(levels, pictures, strict=True):
        assert np.abs(decoded(data, level).astype(int) - picture).mean() < 4
        np.testing.assert_array_equal(decoded(data, level), tifffile.imread(io.BytesIO(data), key=levels.index(level)))


def test_the_colour_space_is_the_files_own_tag_and_no_guess():
    """The same JPEG bytes under another photometric tag are other colours: a decoder that guessed would give one of the two twice."""
    data = a_tiff(a_picture(64, 64), compressionargs={"level": 95})
    (ycbcr,) = tiff_levels(reading(data))
    assert ycbcr.codec is Codec.JPEG_YCBCR
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        tag = page.tags["PhotometricInterpretation"]
        relabelled = bytearray(data)
        struct.pack_into("<H", relabelled, tag.valueoffset, 2)
    (rgb,) = tiff_levels(reading(bytes(relabelled)))
    assert rgb.codec is Codec.JPEG_RGB
    raw = decoded(bytes(relabelled), rgb).astype(float)
    y, cb, cr = raw[..., 0], raw[..., 1] - 128, raw[..., 2] - 128
    converted = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 2)
    assert np.abs(np.clip(converted, 0, 255) - decoded(data, ycbcr)).mean() < 4
    assert np.abs(raw - decoded(data, ycbcr)).mean() > 20


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_a_tile_shrunk_while_it_is_decoded_is_the_mean_of_its_pixels(reduce):
    data = a_tiff(a_picture(64, 64), compressionargs={"level": 98})
    (level,) = tiff_levels(reading(data))
    decoder = Decoder(level)
    whole = decoder.decode(reading(data)(*level.span(0))).astype(float)
    small = decoder.decode(reading(data)(*level.span(0)), reduce=reduce)
    means = whole.reshape(64 // reduce, reduce, 64 // reduce, reduce, 3).mean(axis=(1, 3))
    assert small.shape == means.shape
    assert np.abs(small - means).mean() < 2


@pytest.mark.parametrize(
    "options",
    [
        {"tile": None, "rowsperstrip": 8},
        {"compression": "deflate"},
        {"compression": None},
        {"photometric": "minisblack", "planarconfig": None},
    ],
)
def test_what_is_not_tiled_colour_jpeg_is_left_to_openslide(options):
    picture = a_picture(64, 64)
    if options.get("photometric") == "minisblack":
        picture, options = picture[..., 0], {"photometric": "minisblack"}
    assert tiff_levels(reading(a_tiff(picture, **options))) == ()


def test_jpeg_2000_is_decoded_and_not_shrunk():
    picture = a_picture(64, 64)
    import imagecodecs

    data = bytes(imagecodecs.jpeg2k_encode(picture, level=0, codecformat="J2K", mct=False))
    level = NativeLevel(
        width=64, height=64, tile_width=64, tile_height=64, codec=Codec.JPEG_2000_RGB, tables=b"", span=lambda _: Span(0, len(data))
    )
    np.testing.assert_array_equal(Decoder(level).decode(data), picture)
    with pytest.raises(ValueError, match="1 for JPEG 2000"):
        Decoder(level).decode(data, reduce=2)
    with pytest.raises(LayoutError, match="cannot be decoded"):
        Decoder(level).decode(data[:100])


@pytest.mark.parametrize("change", [{"tile_width": 0}, {"tile_height": 5000}, {"tile_width": 100_000}, {"width": 0}])
def test_impossible_sizes_are_refused(change):
    sizes = {"width": 64, "height": 64, "tile_width": 64, "tile_height": 64} | change
    with pytest.raises(LayoutError, match="in tiles of"):
        NativeLevel(**sizes, codec=Codec.JPEG_RGB, tables=b"", span=lambda _: Span(0, 0))


def test_a_tile_of_another_size_than_the_file_says_is_refused():
    small, large = a_tiff(a_picture(64, 64)), a_tiff(a_picture(128, 128), tile=(128, 128))
    (level,), (other,) = tiff_levels(reading(small)), tiff_levels(reading(large))
    with pytest.raises(LayoutError):
        Decoder(level).decode(reading(large)(*other.span(0)))
    with pytest.raises(LayoutError):
        Decoder(other).decode(reading(small)(*level.span(0)))


def test_damaged_tiles_are_refused_and_not_made_up():
    data = a_tiff(a_picture(64, 64))
    (level,) = tiff_levels(reading(data))
    tile = reading(data)(*level.span(0))
    for broken in (b"", tile[:40], tile[: len(tile) // 2], b"\xff\xd8" + bytes(500), b"no picture"):
        with pytest.raises(LayoutError):
            Decoder(level).decode(broken)


@pytest.mark.parametrize("tables", [b"nonsense", b"\xff\xd8 no end"])
def test_tables_that_are_no_jpeg_stream_are_refused(tables):
    with pytest.raises(LayoutError, match="shared JPEG tables"):
        Decoder(NativeLevel(width=8, height=8, tile_width=8, tile_height=8, codec=Codec.JPEG_RGB, tables=tables, span=lambda _: Span(0, 0)))


def test_images_that_refer_to_each_other_in_a_circle_are_noticed():
    data = bytearray(a_tiff(a_picture(64, 64)))
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    with pytest.raises(LayoutError, match="circle"):
        tiff_levels(reading(bytes(data)))


SMALL = a_tiff(a_picture(64, 64), a_picture(64, 64))
BIG = a_tiff(a_picture(64, 64), bigtiff=True, byteorder=">")


@settings(max_examples=400, deadline=None)
@given(
    data=st.sampled_from([SMALL, BIG]),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8),
    end=st.integers(0, 2**16),
)
def test_files_that_lie_give_a_picture_or_a_layout_error_and_nothing_else(data, changes, end):
    broken = bytearray(data)
    for place, value in changes:
        broken[place % len(broken)] = value
    data = bytes(broken[: max(16, end)])
    try:
        for level in tiff_levels(reading(data)):
            decoder = Decoder(level)
            for index in (0, level.columns * level.rows - 1):
                offset, size = level.span(index)
                if 0 < size < 1 << 20:
                    decoder.decode(reading(data)(offset, size))
    except LayoutError:
        pass


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_no_tiff_or_a_tiff(data):
    for head in (b"", b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0"):
        try:
            tiff_levels(reading(head + data))
        except LayoutError:
            continue


def test_a_tile_number_outside_the_table_is_refused():
    (level, _) = tiff_levels(reading(SMALL))
    for index in (-1, 1, 10**9):
        with pytest.raises(LayoutError, match="asked for number"):
            level.span(index)
