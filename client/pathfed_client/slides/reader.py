"""What a slide reader offers. `io` implements it; everything in `slides` works on any implementation.

Frames: coordinates (x, y) are level-0 pixels from the top-left corner; the size of a region is in pixels of the level it is read from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """A whole slide, small.

    Attributes:
        pixels: uint8 RGB (rows, columns, 3); white where there is no data.
        valid: bool (rows, columns), where the file holds data. A scanner that skips empty glass leaves holes.
        cell: side of one thumbnail pixel, level-0 pixels. The last row and column may reach beyond the slide.
    """

    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    cell: float


class SlideReader(Protocol):
    """One open slide. MUST NOT give access to label or macro images."""

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height, level-0 pixels."""
        ...

    @property
    def downsamples(self) -> tuple[float, ...]:
        """Of each level relative to level 0, beginning with 1."""
        ...

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """Width and height of each level, pixels of that level."""
        ...

    @property
    def mpp(self) -> tuple[float, float] | None:
        """um/px of level 0 along x and y as the file states it, or None."""
        ...

    @property
    def vendor(self) -> str:
        """The format, such as `aperio` or `dicom`."""
        ...

    @property
    def properties(self) -> Mapping[str, str]:
        """The few technical properties that hold no name, date or serial number."""
        ...

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> NDArray[np.uint8]:
        """Pixels of a rectangle: uint8 RGB (height, width, 3).

        MUST raise rather than invent pixels: a region the file has no data for is never returned as white, unless the format states a
        background colour for the holes a scanner leaves and at least a part of the region has data.

        Raises:
            SiteDataError: the region cannot be read or has no data (PF206). Other regions may still be read afterwards.
        """
        ...

    def thumbnail(self, max_px: int) -> Thumbnail:
        """The whole slide with its longer side at most `max_px` pixels; nothing is enlarged.

        Raises:
            SiteDataError: it cannot be read (PF206).
        """
        ...

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        ...
