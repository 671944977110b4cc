"""The decoders' self-test: tiny slides with known pixels through everything a real slide goes through.

A library that was built or installed wrongly may shift colours by a little on every tile, which nobody would see.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from pathfed_client.io.direct_reader import open_direct
from pathfed_client.io.doctor.samples import SAMPLE_PX, SAMPLES, SampleSlide
from pathfed_client.io.doctor.seen import DecoderSeen
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_common.errors import SiteDataError


def check_decoders(samples: Sequence[SampleSlide] = SAMPLES) -> tuple[DecoderSeen, ...]:
    """Decode each sample from its own native tile (simplejpeg, imagecodecs) and through OpenSlide.

    Args:
        samples: tiny slides with known pixels.

    Returns:
        For each sample whether each way gave its pixels, bit for bit. A way that fails altogether did not.
    """
    with TemporaryDirectory(prefix="pathfed-self-test-") as folder:
        return tuple(_checked(sample, Path(folder) / f"{sample.name}.tif") for sample in samples)


def _checked(sample: SampleSlide, path: Path) -> DecoderSeen:
    path.write_bytes(sample.file())
    return DecoderSeen(sample.name, direct=_same(sample, _direct(path)), openslide=_same(sample, _through_openslide(path)))


def _same(sample: SampleSlide, pixels: NDArray[np.uint8] | None) -> bool:
    return pixels is not None and hashlib.sha256(pixels.tobytes()).hexdigest() == sample.pixels


def _direct(path: Path) -> NDArray[np.uint8] | None:
    direct = open_direct([path], SAMPLE_PX, SAMPLE_PX, name=path.stem)
    if direct is None:
        return None
    with direct:
        try:
            return direct.read(0, 0, SAMPLE_PX, SAMPLE_PX)
        except SiteDataError:
            return None


def _through_openslide(path: Path) -> NDArray[np.uint8] | None:
    try:
        with OpenSlideReader(path, name=path.stem) as reader:
            return reader.read_region(0, 0, 0, SAMPLE_PX, SAMPLE_PX)
    except SiteDataError:
        return None
