"""Identifiers planted wherever a slide, a name or a list can hold one, and a search that finds them in whatever form they come out."""

import base64
import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pydicom
import tifffile
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from pathfed_local.generator import slide_bytes

#: TIFF tags that hold text about people, places and machines.
TIFF_TAGS = {
    29: "GpsDateStamp",
    269: "DocumentName",
    270: "ImageDescription",
    271: "Make",
    272: "Model",
    285: "PageName",
    306: "DateTime",
    315: "Artist",
    316: "HostComputer",
    333: "InkNames",
    700: "Xmp",
    33432: "Copyright",
    33723: "Iptc",
    37510: "UserComment",
    42016: "ImageUniqueId",
    42033: "CameraSerial",
    65000: "VendorPrivate",
}
DICOM_TEXTS = (
    "PatientName",
    "PatientID",
    "OtherPatientNames",
    "AccessionNumber",
    "InstitutionName",
    "InstitutionAddress",
    "OperatorsName",
    "ReferringPhysicianName",
    "DeviceSerialNumber",
    "StationName",
    "ContainerIdentifier",
    "StudyDescription",
    "SeriesDescription",
    "StudyID",
)
#: Identifiers that must be dates, numbers or UIDs: told apart from chance by their length.
DICOM_OTHERS = {
    "PatientBirthDate": "19470923",
    "StudyDate": "20190817",
    "StudyInstanceUID": "1.2.826.0.1.99887766.4711001",
    "SeriesInstanceUID": "1.2.826.0.1.99887766.4711002",
    "FrameOfReferenceUID": "1.2.826.0.1.99887766.4711003",
}


#: Further columns of a patient list.
PLANTED_COLUMNS = ("Name", "BirthDate", "Accession", "Block", "Organ", "Physician")
#: What Aperio's scanners say in the description.
APERIO_KEYS = ("ScanScope ID", "Filename", "User", "Title", "Barcode", "Slide", "CaseNumber")


def mark(field: str, number: int = 0) -> str:
    """The identifier planted in one field; of one slide or row, where they tell them apart."""
    return f"Qzx{field}{number}Xzq"


def dicom_mark(name: str) -> str:
    """The identifier planted in a DICOM attribute: at most 16 characters, which is all that some allow."""
    return f"Qz{DICOM_TEXTS.index(name):02d}{name[:9]}Xz"


def planted_tiff(pixels: NDArray[np.uint8], *, aperio: bool = False) -> bytes:
    """A slide with an identifier in every text tag; as Aperio's scanners fill the description, if so wished."""
    texts = {tag: mark(name) for tag, name in TIFF_TAGS.items()}
    if aperio:
        filled = "|".join(f"{key} = {mark('Aperio' + key.replace(' ', ''))}" for key in APERIO_KEYS)
        height, width = pixels.shape[:2]
        texts[270] = f"Aperio Image Library v11.2.1 \r\n{width}x{height} (256x256) JPEG/RGB Q=85|AppMag = 20|{filled}|MPP = 0.5000"
    return slide_bytes(pixels, texts=texts)


def add_label(path: Path) -> None:
    """A label and a macro picture, as scanners append them, whose pixels spell identifiers."""
    with tifffile.TiffWriter(path, append=True) as writer:
        for name in ("label", "macro"):
            text = (mark(name.capitalize() + "Pixels") * 999).encode()[: 3 * 48 * 48]
            shape = (48, 48, 3)
            description = f"Aperio Image Library v11.2.1 \r\n{name} 48x48|{mark(name + 'Text')}"
            pixels = np.frombuffer(text, np.uint8).reshape(shape)
            writer.write(pixels, photometric="rgb", subfiletype=1, description=description, metadata=None)


def plant_dicom(path: Path) -> None:
    """Fill in the identifying attributes of a DICOM file."""
    data: Dataset = pydicom.dcmread(path)
    for name in DICOM_TEXTS:
        setattr(data, name, dicom_mark(name))
    for name, value in DICOM_OTHERS.items():
        setattr(data, name, value)
    data.save_as(path)


def plant_list(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """A patient list with further columns, every one of them telling."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("slide", "patient", *PLANTED_COLUMNS))
        for slide, patient in rows:
            writer.writerow((slide, patient, *(mark("Column" + column) for column in PLANTED_COLUMNS)))


def planted_words() -> set[str]:
    """What `planted_tiff` and `plant_list` plant."""
    fields = [
        *TIFF_TAGS.values(),
        *("Aperio" + key.replace(" ", "") for key in APERIO_KEYS),
        *("Column" + column for column in PLANTED_COLUMNS),
    ]
    return {mark(field) for field in fields}


def found_in(data: bytes, words: Iterable[str]) -> set[str]:
    """Which words are in there: as they are in any case, in UTF-16, hexadecimal, base64, or as a digest that needs no key."""
    low = data.lower()
    found = set()
    for word in words:
        plain, wide = word.encode(), word.encode("utf-16-le")
        digests = [hashlib.new(name, plain) for name in ("md5", "sha1", "sha256")]
        lowered = [plain, wide, word.encode("utf-16-be"), plain.hex().encode(), wide.hex().encode()]
        lowered += [digest.hexdigest().encode() for digest in digests]
        exact = [form for text in (plain, wide) for form in _base64(text)]
        exact += [form for digest in digests for form in (digest.digest(), base64.b64encode(digest.digest()).rstrip(b"="))]
        if any(form.lower() in low for form in lowered) or any(form in data for form in exact):
            found.add(word)
    return found


def _base64(text: bytes) -> list[bytes]:
    """The inner characters of a text's base64 at each of the three places it may begin at."""
    forms = []
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + text)
        first = -(-shift * 8 // 6)
        last = (shift + len(text)) * 8 // 6
        forms += [coded[first:last], base64.urlsafe_b64encode(bytes(shift) + text)[first:last]]
    return forms
