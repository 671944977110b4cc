"""Small real slides, written as a scanner's export would be, and the folder of real ones."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from pathfed_client.io.scan import scan
from pathfed_client.io.site_records import SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.slides.tiling import scan_key
from pathfed_common.plan import CohortPlan
from pathfed_common.synthetic import draw_anatomy, draw_stain, paint
from pathfed_local.generator import slide_bytes

_ROOT = Path(__file__).parents[3]
PLAN = CohortPlan(tile_px=224)
KEY = bytes(range(32))


@pytest.fixture(scope="session")
def slides_data() -> Path:
    """The real slides; tests that need them are skipped where they are not."""
    folder = Path(os.environ.get("PATHFED_TEST_DATA", _ROOT.parent / "shared" / "data"))
    if not (folder / "slides" / "manifest.csv").exists():
        # Named and not there is a mistake, which a skip would hide.
        (pytest.fail if "PATHFED_TEST_DATA" in os.environ else pytest.skip)(f"no real slides at {folder}: set PATHFED_TEST_DATA")
    return folder / "slides"


@pytest.fixture(scope="session")
def tissue() -> NDArray[np.uint8]:
    """768 x 640 pixels full of painted tissue."""
    random = np.random.default_rng(3)
    return paint(768, 640, random, draw_stain(random, 0), draw_anatomy(random), glass=False)


@pytest.fixture
def write_slide(tissue) -> Callable[..., Path]:
    """Write a slide: tissue by default, at 0.5 um/px; a `shift` makes another slide of it."""

    def write(path: Path, pixels: NDArray[np.uint8] | None = None, *, mpp: float = 0.5, shift: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(slide_bytes(np.roll(tissue, shift, axis=1) if pixels is None else pixels, mpp=mpp))
        return path

    return write


@pytest.fixture
def break_tile() -> Callable[..., None]:
    """Damage one 256-pixel tile of a slide's level 0: its bytes become nonsense, or it is taken out of the file."""

    def damage(path: Path, tile: int, *, take_out: bool = False) -> None:
        with tifffile.TiffFile(path, mode="r+") as file:
            page = file.pages[0]
            assert isinstance(page, tifffile.TiffPage)
            counts = list(page.databytecounts)
            start = page.dataoffsets[tile]
            if take_out:
                page.tags["TileByteCounts"].overwrite([0 if index == tile else count for index, count in enumerate(counts)])
        if not take_out:
            data = bytearray(path.read_bytes())
            data[start : start + counts[tile]] = bytes(counts[tile])
            path.write_bytes(data)

    return damage


@pytest.fixture
def write_dicom() -> Callable[[Path, str], Path]:
    """Write a file with a DICOM head that names a series, and nothing else."""

    def write(path: Path, series: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        value = series.encode() + b"\0" * (len(series) % 2)
        path.write_bytes(bytes(128) + b"DICM" + struct.pack("<HH2sH", 0x20, 0x0E, b"UI", len(value)) + value)
        return path

    return write


class ScannedSite:
    """A slides folder, a patient list and a database, with what tests do to them."""

    def __init__(self, home: Path, write_slide) -> None:
        self.folder, self.list, self.write_slide = home / "slides", home / "patients.csv", write_slide
        self.folder.mkdir()
        self.store = SiteStore(home / "site.db")

    def add(self, *names: str) -> None:
        for name in names:
            self.write_slide(self.folder / name, shift=sum(name.encode()) % 97)

    def map(self, **patients: str) -> None:
        """Patients by slide, without the suffix: `a="P1"` lists a.tif for P1."""
        self.list.write_text("slide,patient\n" + "".join(f"{name}.tif,{patient}\n" for name, patient in patients.items()))

    def scan(self, plan=PLAN, **more):
        return scan(self.store, self.folder, self.list, plan, KEY, **{"now": 7.0, **more})

    def statuses(self, plan=PLAN) -> dict[str, tuple[str, str | None]]:
        return {record.path: (record.status, record.reason) for record in self.store.slides(scan_key(plan)).values()}

    def done(self) -> list[str]:
        return [path for path, (status, _) in self.statuses().items() if status != SlideStatus.PENDING]

    def numbers(self) -> dict[str, int]:
        return {record.path: number for number, record in self.store.slides(scan_key(PLAN)).items()}


@pytest.fixture
def site(tmp_path, write_slide):
    made = ScannedSite(tmp_path, write_slide)
    yield made
    made.store.close()
