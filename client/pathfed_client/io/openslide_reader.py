"""Slides through OpenSlide: the only module that imports it.

Label and macro images are never opened: they show names and handwriting.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from pathfed_client.slides.reader import Thumbnail
from pathfed_common.errors import ErrorCode, SiteDataError

#: Technical properties that may be looked at. Everything else (comments, dates, users, serial numbers) is dropped on opening.
ALLOWED_PROPERTIES = (
    "openslide.vendor",
    "openslide.mpp-x",
    "openslide.mpp-y",
    "openslide.objective-power",
    "openslide.background-color",
)
_BAND_PX = 8_000_000  # pixels decoded at once for a thumbnail: 32 MB


class OpenSlideReader:
    """One slide opened with OpenSlide; implements `SlideReader`. A context manager."""

    def __init__(self, path: Path, *, name: str, files: Sequence[Path] = ()) -> None:
        """Open a slide.

        Args:
            path: the file; for DICOM any file of the series.
            name: what to call it in errors: its path relative to the slides folder.
            files: all its files. OpenSlide looks for a DICOM series in one folder; a series that is spread over several is opened
                through a folder of links.

        Raises:
            SiteDataError: it cannot be opened (PF205).
        """
        self._path = path
        self._name = name
        self._links: TemporaryDirectory[str] | None = None
        if path.suffix.lower() not in (".mrxs", ".vms", ".vmu") and len({file.parent for file in files}) > 1:
            self._links = TemporaryDirectory(prefix="pathfed-series-")
            self._path = _linked(files, Path(self._links.name))
        try:
            self._slide = self._opened()
        except SiteDataError:
            self._unlink()
            raise
        try:
            self._properties = {key: self._slide.properties[key] for key in ALLOWED_PROPERTIES if key in self._slide.properties}
            self._sizes = self._slide.level_dimensions
            self._downsamples = self._slide.level_downsamples
        except openslide.OpenSlideError as error:
            self.close()
            raise SiteDataError(ErrorCode.SLIDE_UNOPENABLE, f"the slide cannot be opened: {error}", where=name) from error
        self._background = _colour(self._properties.get("openslide.background-color"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._slide.close()
        self._unlink()

    def _unlink(self) -> None:
        if self._links is not None:
            self._links.cleanup()
            self._links = None

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height, level-0 pixels."""
        return self._sizes[0]

    @property
    def downsamples(self) -> tuple[float, ...]:
        """Of each level relative to level 0."""
        return self._downsamples

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each level, pixels of that level."""
        return self._sizes

    @property
    def mpp(self) -> tuple[float, float] | None:
        """um/px of level 0 along x and y as the file states it, or None when either is absent or no number."""
        try:
            return float(self._properties["openslide.mpp-x"]), float(self._properties["openslide.mpp-y"])
        except (KeyError, ValueError):
            return None

    @property
    def vendor(self) -> str:
        """OpenSlide's name of the format."""
        return self._properties.get("openslide.vendor", "unknown")

    @property
    def properties(self) -> Mapping[str, str]:
        """Those of `ALLOWED_PROPERTIES` the file has."""
        return self._properties

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `SlideReader.read_region`."""
        pixels = self._rgba(x, y, level, width, height)
        alpha = pixels[..., 3]
        if alpha.min() < 255:
            if self._background is None or not alpha.any():
                raise self._unreadable("a region of the slide has no pixels", value=f"{width} x {height} at ({x}, {y}), level {level}")
            pixels = _composited(pixels, self._background)
        return np.ascontiguousarray(pixels[..., :3])

    def thumbnail(self, max_px: int) -> Thumbnail:
        """See `SlideReader.thumbnail`. Reads bands, so that a slide without small levels needs no more memory than any other."""
        sizes = self._sizes
        level = max((index for index, size in enumerate(sizes) if max(size) >= max_px), key=lambda index: -max(sizes[index]), default=0)
        width, height = sizes[level]
        factor = -(-max(width, height) // max_px)
        rows = max(1, _BAND_PX // (width * factor)) * factor
        colours, solid = [], []
        for top in range(0, height, rows):
            y = round(top * self.downsamples[level])
            band = self._rgba(0, y, level, width, min(rows, height - top))
            alpha = band[..., 3]
            pixels = band if alpha.min() == 255 else _composited(band, np.full(3, 255.0))
            colours.append(np.asarray(Image.fromarray(np.ascontiguousarray(pixels[..., :3])).reduce(factor)))
            solid.append(np.asarray(Image.fromarray(np.ascontiguousarray(alpha)).reduce(factor)) >= 128)
        return Thumbnail(np.concatenate(colours), np.concatenate(solid), cell=factor * self.downsamples[level])

    def _opened(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self._path)
        except (openslide.OpenSlideError, OSError) as error:
            raise SiteDataError(ErrorCode.SLIDE_UNOPENABLE, f"the slide cannot be opened: {error}", where=self._name) from error

    def _rgba(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        try:
            return np.asarray(self._slide.read_region((x, y), level, (width, height)))
        except (openslide.OpenSlideError, OSError) as error:
            # OpenSlide refuses every later read after one error; a fresh handle keeps one bad spot from taking the slide with it.
            self._slide.close()
            self._slide = self._opened()
            raise self._unreadable(f"a region of the slide cannot be read: {error}", value=f"({x}, {y}), level {level}") from error

    def _unreadable(self, what: str, *, value: str) -> SiteDataError:
        return SiteDataError(ErrorCode.SLIDE_UNREADABLE, what, where=self._name, value=value)


def _linked(files: Sequence[Path], folder: Path) -> Path:
    """Links to all files of a series in one folder; the first of them."""
    links = [folder / f"{number:06d}.dcm" for number in range(len(files))]
    for link, file in zip(links, files, strict=True):
        link.symlink_to(file.resolve())
    return links[0]


def _colour(text: str | None) -> NDArray[np.float64] | None:
    """RGB of a six-digit hex colour, or None."""
    try:
        return None if text is None else np.array(list(bytes.fromhex(text)), np.float64)
    except ValueError:
        return None


def _composited(pixels: NDArray[np.uint8], background: NDArray[np.float64]) -> NDArray[np.uint8]:
    share = pixels[..., 3:] / 255.0
    return np.round(pixels[..., :3] * share + background * (1 - share)).astype(np.uint8)
