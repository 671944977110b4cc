"""Synthetic hospitals: folders of painted slides with a patient list each, for demonstrations and tests.

    DIR/hospital-a/slides/case-a-0001-1.tif ...
    DIR/hospital-a/patients.csv             slide,patient

Slides are pyramidal tiled JPEG TIFFs at 0.5 um/px, as a scanner's export would be. Each hospital has its own stain and scanner tone, each
patient an anatomy of their own that all their slides share. Equal seeds give equal pixels, whatever the number of hospitals or patients.
"""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.files import disk_error, write_atomic
from pathfed_common.synthetic import PAINTED_MPP, draw_anatomy, draw_stain, paint

_BLOCK = 256  # side of a JPEG tile inside the file, pixels
_QUALITY = 85
_DOWNSAMPLES = (2, 4)
_ROUND = 64  # sides are multiples of it, so that every level ends on a whole JPEG block and no dark fringe appears


@dataclass(frozen=True, kw_only=True)
class GeneratedHospital:
    """One hospital as written.

    Attributes:
        name: `hospital-a`, `hospital-b`, ...
        slides_folder: where its slides lie.
        patient_list: its CSV.
        patients: how many.
        slides: how many.
    """

    name: str
    slides_folder: Path
    patient_list: Path
    patients: int
    slides: int


def generate_hospitals(
    out: Path,
    *,
    hospitals: int = 3,
    patients: int = 24,
    slides_per_patient: int = 2,
    seed: int = 0,
    side_px: tuple[int, int] = (1024, 1536),
    progress: Callable[[int, int], None] | None = None,
) -> list[GeneratedHospital]:
    """Paint and write hospitals.

    Args:
        out: made if absent; must not hold any of these hospitals yet.
        hospitals: how many, 1 to 26.
        patients: in each hospital.
        slides_per_patient: of each patient.
        seed: equal seeds give equal pixels.
        side_px: smallest and largest side of a slide, pixels at 0.5 um/px.
        progress: called with (slides done, slides in all) after each slide.

    Returns:
        The hospitals, in order.

    Raises:
        ValueError: a number below 1, more than 26 hospitals, or sides that are not 1 <= smallest <= largest.
        HostError: a hospital is there already or the folder cannot be written (PF904), or the disk is full (PF901).
    """
    if min(hospitals, patients, slides_per_patient) < 1 or hospitals > len(_LETTERS):
        raise ValueError(f"need 1 to 26 hospitals, 1 patient and 1 slide or more, got {hospitals}, {patients}, {slides_per_patient}")
    if not 1 <= side_px[0] <= side_px[1]:
        raise ValueError(f"side_px must be (smallest, largest) of at least 1, got {side_px}")
    folders = [out / f"hospital-{letter}" for letter in _LETTERS[:hospitals]]
    for folder in folders:
        _make_empty(folder)
    total, done = hospitals * patients * slides_per_patient, 0
    written = []
    for hospital, folder in enumerate(folders):
        rows = []
        for patient in range(patients):
            anatomy = draw_anatomy(np.random.default_rng([seed, hospital, patient]))
            for number in range(slides_per_patient):
                random = np.random.default_rng([seed, hospital, patient, number + 1])
                width, height = (int(side) // _ROUND * _ROUND or int(side) for side in random.integers(side_px[0], side_px[1] + 1, 2))
                name = f"case-{_LETTERS[hospital]}-{patient + 1:04d}-{number + 1}.tif"
                pixels = paint(width, height, random, draw_stain(random, hospital), anatomy)
                write_atomic(folder / "slides" / name, slide_bytes(pixels))
                rows.append((name, f"MRN{hospital + 1}{patient + 1:05d}"))
                done += 1
                if progress is not None:
                    progress(done, total)
        written.append(_finish(folder, rows, patients))
    return written


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _make_empty(folder: Path) -> None:
    try:
        (folder / "slides").mkdir(parents=True, exist_ok=True)
        if (folder / "patients.csv").exists() or any((folder / "slides").iterdir()):
            raise HostError(
                ErrorCode.HOME_UNUSABLE, "there is a hospital here already", where=folder, remedy="name another folder, or remove this one"
            )
    except OSError as error:
        raise disk_error(error, folder) from error


def _finish(folder: Path, rows: list[tuple[str, str]], patients: int) -> GeneratedHospital:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("slide", "patient"))
    writer.writerows(rows)
    write_atomic(folder / "patients.csv", text.getvalue().encode())
    return GeneratedHospital(
        name=folder.name, slides_folder=folder / "slides", patient_list=folder / "patients.csv", patients=patients, slides=len(rows)
    )


def slide_bytes(pixels: NDArray[np.uint8], *, mpp: float = PAINTED_MPP, texts: Mapping[int, str] | None = None) -> bytes:
    """A pyramidal tiled JPEG TIFF with levels at full, half and quarter size.

    Args:
        pixels: uint8 RGB (height, width, 3), level 0.
        mpp: um/px of level 0, stated in the resolution tags.
        texts: what further tags of level 0 say, by their numbers, as scanners and laboratories fill them.
    """
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        _add_level(writer, pixels, mpp, reduced=False, texts=texts or {})
        for down in _DOWNSAMPLES:
            _add_level(writer, np.asarray(Image.fromarray(pixels).reduce(down)), mpp * down, reduced=True)
    return file.getvalue()


def _add_level(
    writer: tifffile.TiffWriter, pixels: NDArray[np.uint8], mpp: float, *, reduced: bool, texts: Mapping[int, str] = MappingProxyType({})
) -> None:
    per_cm = 10_000 / mpp
    writer.write(
        pixels,
        tile=(_BLOCK, _BLOCK),
        photometric="rgb",  # tifffile stores YCbCr by itself; photometric="ycbcr" would give wrong colours
        compression="jpeg",
        compressionargs={"level": _QUALITY},
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
        subfiletype=int(reduced),
        software="pathfed synthetic slide",
        metadata=None,
        extratags=[(number, "s", 0, text, True) for number, text in texts.items()],
    )
