"""Finding the frames of DICOM whole-slide levels, with every kind of offset table, and in files that lie."""

import io
import struct
from collections.abc import Iterable

import numpy as np
import pydicom
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileMetaDataset
from pydicom.uid import JPEG2000, ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from pathfed_client.slides.dicom_layout import dicom_level
from pathfed_client.slides.native import Codec, Decoder, LayoutError

SIDE, COLUMNS, ROWS = 32, 3, 2


def frames(seed: int = 0) -> list[bytes]:
    ys, xs = np.mgrid[:SIDE, :SIDE] / 10
    pictures = [(128 + 100 * np.sin(ys + xs + seed + np.arange(3)[:, None, None] + n)).astype(np.uint8) for n in range(COLUMNS * ROWS)]
    return [simplejpeg.encode_jpeg(np.ascontiguousarray(picture.transpose(1, 2, 0)), quality=95) for picture in pictures]


def item(data: bytes) -> bytes:
    padded = data + b"\0" * (len(data) % 2)
    return b"\xfe\xff\x00\xe0" + struct.pack("<I", len(padded)) + padded


def pixel_data(parts: Iterable[bytes], table: str) -> bytes:
    items = [item(part) for part in parts]
    starts = np.cumsum([0, *(len(one) for one in items[:-1])])
    offsets = starts.astype("<u4").tobytes() if table == "basic" else b""
    end = b"\xfe\xff\xdd\xe0\0\0\0\0"
    return b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff" + item(offsets) + b"".join(items) + end


def a_file(table: str = "basic", parts: list[bytes] | None = None, syntax: str = JPEGBaseline8Bit, **changes) -> bytes:
    """A level of a slide with names, dates and numbers in it that nobody may read."""
    head = pydicom.Dataset()
    head.file_meta = FileMetaDataset()
    head.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    head.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID("1.2.840.10008.5.1.4.1.1.77.1.6")
    head.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    values = {
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "PatientName": "Planted^Name",
        "DimensionOrganizationType": "TILED_FULL",
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "YBR_FULL_422",
        "NumberOfFrames": COLUMNS * ROWS,
        "Rows": SIDE,
        "Columns": SIDE,
        "BitsAllocated": 8,
        "TotalPixelMatrixColumns": COLUMNS * SIDE - 5,
        "TotalPixelMatrixRows": ROWS * SIDE - 3,
        **changes,
    }
    parts = frames() if parts is None else parts
    if table == "extended":
        lengths = [len(item(part)) for part in parts]
        values["ExtendedOffsetTable"] = np.cumsum([0, *lengths[:-1]]).astype("<u8").tobytes()
        values["ExtendedOffsetTableLengths"] = np.array([length - 8 for length in lengths], "<u8").tobytes()
    for name, value in values.items():
        if value is not None:
            setattr(head, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, head, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return file.getvalue() + pixel_data(parts, table)


def level_of(data: bytes):
    return dicom_level(io.BytesIO(data), lambda offset, size: data[offset : offset + size])


@pytest.mark.parametrize("table", ["basic", "extended", "none"])
def test_every_frame_is_found_whatever_table_the_file_has(table):
    data = a_file(table)
    level = level_of(data)
    assert (level.width, level.height, level.columns, level.rows) == (COLUMNS * SIDE - 5, ROWS * SIDE - 3, COLUMNS, ROWS)
    assert level.codec is Codec.JPEG_YCBCR
    for index, frame in enumerate(frames()):
        offset, size = level.span(index)
        assert data[offset : offset + size].rstrip(b"\0") == frame.rstrip(b"\0")
        pixels = Decoder(level).decode(data[offset : offset + size])
        np.testing.assert_array_equal(pixels, simplejpeg.decode_jpeg(frame))
    for index in (-1, COLUMNS * ROWS):
        with pytest.raises(LayoutError, match="asked for number"):
            level.span(index)


@pytest.mark.parametrize(
    "change",
    [
        {"ImageType": ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "OVERVIEW", "NONE"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "THUMBNAIL", "NONE"]},
        {"ImageType": None},
        {"DimensionOrganizationType": "TILED_SPARSE"},
        {"DimensionOrganizationType": None},
        {"SamplesPerPixel": 1},
        {"BitsAllocated": 16},
        {"PhotometricInterpretation": "MONOCHROME2"},
        {"NumberOfOpticalPaths": 4},
        {"TotalPixelMatrixFocalPlanes": 3},
        {"syntax": ExplicitVRLittleEndian},
    ],
)
def test_labels_and_what_is_not_plain_tiled_colour_are_passed_over(change):
    assert level_of(a_file(**change)) is None


def test_jpeg_2000_in_rgb_is_known_and_in_other_colours_left_to_openslide():
    assert level_of(a_file(syntax=JPEG2000, PhotometricInterpretation="RGB")).codec is Codec.JPEG_2000_RGB
    assert level_of(a_file(syntax=JPEG2000, PhotometricInterpretation="YBR_RCT")) is None


@pytest.mark.parametrize(
    "change", [{"NumberOfFrames": 0}, {"NumberOfFrames": 2**30}, {"NumberOfFrames": None}, {"Rows": 0}, {"Columns": 65000}]
)
def test_absurd_numbers_are_refused(change):
    with pytest.raises(LayoutError):
        level_of(a_file("none", **change))


def test_frames_in_several_pieces_without_a_table_are_refused():
    whole = frames()
    with pytest.raises(LayoutError, match="which belong together"):
        level_of(a_file("none", [whole[0][:200], whole[0][200:], *whole[1:]]))


def test_what_is_no_dicom_file_is_refused():
    for data in (b"", b"nonsense", bytes(200)):
        with pytest.raises(LayoutError):
            level_of(data)
    assert level_of(bytes(128) + b"DICM") is None


WHOLE = a_file("basic")


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6), end=st.integers(150, 2**16))
def test_files_that_lie_give_a_level_or_a_layout_error_and_nothing_else(changes, end):
    broken = bytearray(WHOLE)
    for place, value in changes:
        broken[place % len(broken)] = value
    data = bytes(broken[:end])
    try:
        level = level_of(data)
        if level is not None:
            offset, size = level.span(0)
            Decoder(level).decode(data[offset : offset + min(size, 1 << 20)])
    except LayoutError:
        pass
