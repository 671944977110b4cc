import struct

import pytest

from pathfed_client.slides.dicom_series import series_uid

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
UNDEFINED = 0xFFFFFFFF


def element(group, number, kind, value: bytes, *, explicit=True, length=None) -> bytes:
    value += b"\0" * (len(value) % 2)
    size = len(value) if length is None else length
    head = struct.pack("<HH", group, number)
    if not explicit:
        return head + struct.pack("<I", size) + value
    if kind in (b"SQ", b"OB", b"UN"):
        return head + kind + b"\0\0" + struct.pack("<I", size) + value
    return head + kind + struct.pack("<H", size) + value


def item(value: bytes, length=None) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value) if length is None else length) + value


ITEM_END = struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def dicom(*elements: bytes, syntax=EXPLICIT) -> bytes:
    return bytes(128) + b"DICM" + element(2, 0x10, b"UI", syntax.encode()) + b"".join(elements)


def uid(text: str, *, explicit=True) -> bytes:
    return element(0x20, 0x0E, b"UI", text.encode(), explicit=explicit)


@pytest.mark.parametrize("explicit", [True, False])
def test_series_is_found_after_other_elements(explicit):
    data = dicom(
        element(8, 0x60, b"CS", b"SM", explicit=explicit),
        element(0x18, 0x1000, b"LO", b"SECRET", explicit=explicit),
        uid("1.2.3.4", explicit=explicit),
        syntax=EXPLICIT if explicit else IMPLICIT,
    )
    assert series_uid(data) == "1.2.3.4"


@pytest.mark.parametrize("explicit", [True, False])
def test_series_a_file_refers_to_is_not_taken_for_its_own(explicit):
    inner = uid("9.9.9", explicit=explicit)
    nested = item(inner + element(8, 0x1199, b"SQ", item(inner), explicit=explicit))
    open_ended = item(inner, length=UNDEFINED) + ITEM_END + SEQUENCE_END
    data = dicom(
        element(8, 0x1115, b"SQ", nested, explicit=explicit),
        element(8, 0x1140, b"SQ", open_ended, explicit=explicit, length=UNDEFINED),
        uid("1.2.3", explicit=explicit),
        syntax=EXPLICIT if explicit else IMPLICIT,
    )
    assert series_uid(data) == "1.2.3"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"II*\0" + bytes(300),
        dicom(),
        dicom(element(8, 0x60, b"CS", b"SM")),
        dicom(element(0x28, 0x10, b"US", b"\1\0"), uid("1.2")),
        dicom(uid("1.2.3"))[:-4][:150],
        dicom(element(8, 0x1115, b"SQ", item(b"", length=UNDEFINED) * 40, length=UNDEFINED)),
    ],
    ids=["empty", "tiff", "no elements", "cut off", "without a series", "cut in the header", "nested without end"],
)
def test_anything_else_has_no_series(data):
    assert series_uid(data) is None
