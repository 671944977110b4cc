"""The real tiles, for thresholds that were measured on them."""

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from thumbnails import load_tiles

_ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("PATHFED_TEST_DATA", _ROOT.parent / "shared" / "data"))
    if not (folder / "tiles" / "labels.csv").exists():
        pytest.skip(f"no real tiles at {folder}: set PATHFED_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def real_tiles(data_folder: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """The real lung tiles, uint8 (n, 224, 224, 3), and the class of each."""
    return load_tiles(data_folder)
