"""Small hospitals, a small plan, and the processes of a consortium, for tests that run the real thing from slides to encoder."""

import csv
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import tifffile
from planted import plant_list, planted_tiff

from pathfed_local.generator import generate_hospitals

T = TypeVar("T")

PLAN = """
name = "quick"
[objective]
decoder_dim = 32
decoder_depth = 1
decoder_heads = 2
[cohort]
tile_px = 96
tiles_per_patient = 2
tissue_share = 0.2
[privacy]
expected_patients = 2
noise_multiplier = 4.0
clip_norm = 1.0
figure_share = 0.5
loss_bound = 1.5
delta = 1e-5
epsilon_limit = 8.0
[rounds]
count = 2
deadline_s = 120
quorum = 2
reply_slot_s = 1
[server_optimiser]
name = "sgd"
learning_rate = 0.1
"""


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that a round of takes seconds."""
    path = tmp_path_factory.mktemp("plan") / "quick.toml"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three painted hospitals of six patients each, with identifiers in every text tag of a slide and every column of a list."""
    folder = tmp_path_factory.mktemp("hospitals")
    generate_hospitals(folder, hospitals=3, patients=6, slides_per_patient=1, seed=3, side_px=(512, 640))
    for number, slide in enumerate(sorted(folder.glob("*/slides/*.tif"))):
        slide.write_bytes(planted_tiff(tifffile.imread(slide, key=0), aperio=bool(number % 2)))
    for patient_list in folder.glob("*/patients.csv"):
        with patient_list.open(newline="") as file:
            rows = [(row["slide"], row["patient"]) for row in csv.DictReader(file)]
        plant_list(patient_list, rows)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides and tiles."""
    folder = Path(os.environ.get("PATHFED_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not folder.is_dir():
        # Named and not there is a mistake, which a skip would hide.
        (pytest.fail if "PATHFED_TEST_DATA" in os.environ else pytest.skip)(f"no test data in {folder}: set PATHFED_TEST_DATA")
    return folder


def processes_of(folder: Path) -> list[psutil.Process]:
    """Living processes whose command, or environment, names a folder, but for the tests' own."""
    found = []
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            if process.pid not in own and process.status() != psutil.STATUS_ZOMBIE:
                words = [*process.cmdline(), *process.environ().values()]
                if any(str(folder) in word for word in words):
                    found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture
def leaves_no_process(tmp_path: Path) -> Iterator[None]:
    """Fails a test after which a process that names its folder is left."""
    yield
    left = wait_for(lambda: processes_of(tmp_path), until=lambda found: not found, within_s=60)
    assert not left, [process.cmdline() for process in left]


def wait_for(look: Callable[[], T], *, until: Callable[[T], object], within_s: float) -> T:
    """Look again and again until it is as wished, or the time is up; what was seen last."""
    end = time.monotonic() + within_s
    seen = look()
    while not until(seen) and time.monotonic() < end:
        time.sleep(0.3)
        seen = look()
    return seen


@pytest.fixture(scope="session", name="wait_for")
def _wait_for_fixture() -> Callable[..., object]:
    """`wait_for`, for tests."""
    return wait_for


@pytest.fixture(scope="session", name="processes_of")
def _processes_of_fixture() -> Callable[[Path], list[psutil.Process]]:
    """`processes_of`, for tests."""
    return processes_of
