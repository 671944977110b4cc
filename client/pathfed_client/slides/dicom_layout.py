"""Where the compressed frames of a DICOM whole-slide level lie.

One file of a series holds one level; each frame is a native tile (DICOM PS3.3 A.32.8, tiled full). Frames are found by the basic or the
extended offset table (PS3.5 A.4, PS3.3 C.7.6.3.1.8), or item by item where a file has neither. Only the technical attributes of `_READ`
are read: names, dates and identifiers stay unread, and files that hold a label or overview picture are passed over by their image type.
"""

import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import BytesLengthException, InvalidDicomError

from pathfed_client.slides.native import Codec, DamagedLayoutError, LayoutError, NativeLevel, Span
from pathfed_client.slides.tiff_layout import ReadAt

_READ = (
    "ImageType",
    "DimensionOrganizationType",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "NumberOfOpticalPaths",
    "TotalPixelMatrixFocalPlanes",
    "TotalPixelMatrixColumns",
    "TotalPixelMatrixRows",
    "ExtendedOffsetTable",
)
_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_CODECS: Mapping[tuple[str, str], Codec] = {
    (_JPEG_BASELINE, "RGB"): Codec.JPEG_RGB,
    (_JPEG_BASELINE, "YBR_FULL_422"): Codec.JPEG_YCBCR,
    (_JPEG_2000[0], "RGB"): Codec.JPEG_2000_RGB,
    (_JPEG_2000[1], "RGB"): Codec.JPEG_2000_RGB,
}
_PIXELS = b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff"
_ITEM = b"\xfe\xff\x00\xe0"
_MOST_FRAMES = 1 << 24
#: What pydicom raises on files that break the standard.
_PYDICOM_RAISES = (
    BytesLengthException,
    InvalidDicomError,
    AttributeError,
    TypeError,
    KeyError,
    ValueError,
    ZeroDivisionError,
    IndexError,
    OverflowError,
    NotImplementedError,
    EOFError,
    RecursionError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True)
class _Frames:
    """Finds a frame's bytes: `starts` are the places of the frames' items; an item says its own length."""

    read_at: ReadAt = field(repr=False)
    starts: NDArray[np.int64] = field(repr=False)

    def __call__(self, index: int) -> Span:
        if not 0 <= index < len(self.starts):
            raise LayoutError(f"the file has {len(self.starts)} frames, asked for number {index}")
        at = int(self.starts[index])
        return Span(at + 8, _item_length(self.read_at, at))


def dicom_level(file: BinaryIO, read_at: ReadAt) -> NativeLevel | None:
    """The level that one file of a series holds.

    Args:
        file: the file, opened; read from its beginning.
        read_at: reads the same file.

    Returns:
        None for a label, overview or thumbnail, and for what is not tiled full, in 8-bit RGB or YCbCr, JPEG or JPEG 2000.

    Raises:
        LayoutError: this is no DICOM file, or its frames cannot be found.
        DamagedLayoutError: it does not have one frame for each place of its picture.
    """
    try:
        head, at = _head(file)
        if "VOLUME" not in head.get("ImageType", ()) or not _is_plain(head):
            return None
        codec = _CODECS.get((str(head.file_meta.TransferSyntaxUID), str(head.get("PhotometricInterpretation", ""))))
        if codec is None:
            return None
        frames = int(head.NumberOfFrames)
        if not 0 < frames <= _MOST_FRAMES:
            raise LayoutError(f"the file claims {frames} frames")
        _check_frames(head, frames)
        starts = _starts(read_at, at, frames, head.get("ExtendedOffsetTable"))
        return NativeLevel(
            width=int(head.TotalPixelMatrixColumns),
            height=int(head.TotalPixelMatrixRows),
            tile_width=int(head.Columns),
            tile_height=int(head.Rows),
            codec=codec,
            tables=b"",
            span=_Frames(read_at, starts),
        )
    except LayoutError:
        raise
    except _PYDICOM_RAISES as error:
        raise LayoutError(f"not a readable DICOM slide: {type(error).__name__}") from None


def _head(file: BinaryIO) -> tuple[pydicom.Dataset, int]:
    """The wanted attributes, and where the pixels begin. Warnings of pydicom could quote what a file holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_READ))
        for name in _READ:
            head.get(name)  # converts the value, and warns if it must
    return head, file.tell()


def _is_plain(head: pydicom.Dataset) -> bool:
    """Whether frames are 8-bit colour tiles of one picture, in rows from the top."""
    return bool(
        head.get("DimensionOrganizationType") == "TILED_FULL"
        and head.get("SamplesPerPixel") == 3
        and head.get("BitsAllocated") == 8
        and head.get("NumberOfOpticalPaths", 1) == 1
        and head.get("TotalPixelMatrixFocalPlanes", 1) == 1
    )


def _check_frames(head: pydicom.Dataset, frames: int) -> None:
    columns = -(-int(head.TotalPixelMatrixColumns) // int(head.Columns))
    rows = -(-int(head.TotalPixelMatrixRows) // int(head.Rows))
    if frames != columns * rows:
        raise DamagedLayoutError(f"the file has {frames} frames for {columns} x {rows} places")


def _starts(read_at: ReadAt, at: int, frames: int, extended: bytes | None) -> NDArray[np.int64]:
    """Places of all frames' items, from the pixel element at `at` on."""
    if read_at(at, len(_PIXELS)) != _PIXELS:
        raise LayoutError("the pixels are not compressed frame by frame")
    table = at + len(_PIXELS)
    table_bytes = _item_length(read_at, table)
    first = table + 8 + table_bytes
    if extended is not None and len(extended) == 8 * frames:
        return first + np.frombuffer(extended, "<u8").astype(np.int64)
    if table_bytes == 4 * frames:
        return first + np.frombuffer(read_at(table + 8, table_bytes), "<u4").astype(np.int64)
    return _walked(read_at, first, frames)


def _walked(read_at: ReadAt, first: int, frames: int) -> NDArray[np.int64]:
    """Places of frames in a file without an offset table: one item follows another."""
    starts = np.empty(frames, np.int64)
    at = first
    for index in range(frames):
        starts[index] = at
        at += 8 + _item_length(read_at, at)
    if read_at(at, 4) == _ITEM:
        raise LayoutError("the file has more items than frames: which belong together is not stated")
    return starts


def _item_length(read_at: ReadAt, at: int) -> int:
    head = read_at(at, 8)
    if len(head) != 8 or head[:4] != _ITEM:
        raise LayoutError("a frame is not where the file says")
    length: int = struct.unpack("<I", head[4:])[0]
    return length
