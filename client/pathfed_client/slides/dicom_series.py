"""Which series a DICOM file belongs to: the least that must be read to know which files make up one slide.

A whole-slide image in DICOM is a series: one file for each level, further ones for label and overview. Reads the Series Instance UID
(0020,000E) of the data set itself, not of series it refers to. Encodings: DICOM PS3.5 sections 7.1 (elements) and 7.5 (sequences).
"""

import struct

#: Bytes of a file's beginning that hold it in practice: pixel data and large sequences come later.
HEAD_BYTES = 1 << 16

_SERIES_UID = (0x0020, 0x000E)
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_DEEPEST = 16


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these bytes is DICOM."""
    return head[128:132] == b"DICM"


def series_uid(head: bytes) -> str | None:
    """The Series Instance UID of a DICOM file.

    Args:
        head: the file's first `HEAD_BYTES` bytes.

    Returns:
        The UID, or None when this is no DICOM file, or one that is compressed as a whole, or it is not found in `head`.
    """
    if not is_dicom(head):
        return None
    explicit, at = True, 132
    try:
        while True:
            group = struct.unpack_from("<H", head, at)[0]
            if group != 0x0002:
                break
            tag, length, value = _element(head, at, explicit=True)
            if tag == (0x0002, 0x0010):
                explicit = _text(head[value : value + length]) != "1.2.840.10008.1.2"
            at = value + length
        while True:
            tag, length, value = _element(head, at, explicit=explicit)
            if tag == _SERIES_UID:
                return _text(head[value : value + length]) or None
            if tag > _SERIES_UID:
                return None
            at = _after(head, value, length, explicit=explicit, depth=0)
    except (struct.error, ValueError):
        return None


def _text(value: bytes) -> str:
    return value.decode("ascii").strip(" \0")


def _element(head: bytes, at: int, *, explicit: bool) -> tuple[tuple[int, int], int, int]:
    """Tag, length and start of the value of the element at `at`."""
    group, number = struct.unpack_from("<HH", head, at)
    tag = (group, number)
    if not explicit or group == 0xFFFE:
        return tag, struct.unpack_from("<I", head, at + 4)[0], at + 8
    kind = head[at + 4 : at + 6]
    if kind in _LONG:
        return tag, struct.unpack_from("<I", head, at + 8)[0], at + 12
    return tag, struct.unpack_from("<H", head, at + 6)[0], at + 8


def _after(head: bytes, value: int, length: int, *, explicit: bool, depth: int) -> int:
    """Where the next element begins, past sequences of undefined length."""
    if length != _UNDEFINED:
        return value + length
    if depth > _DEEPEST:
        raise ValueError("sequences nested too deeply")
    while True:
        tag, size, inner = _element(head, value, explicit=explicit)
        if tag in (_SEQUENCE_END, _ITEM_END):
            return inner
        # An item holds elements, a sequence holds items: both end with their own mark when their length is undefined.
        value = _after(head, inner, size, explicit=explicit, depth=depth + 1)
