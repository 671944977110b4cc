"""`pathfed-site inspect`: one slide under one plan's rules, as a page with pictures for the site's own eyes.

Guarantees: every file is written with mode 0600 into a folder of 0700, whole or not at all; label, macro and thumbnail images of the file
are never opened; of its properties only the technical ones of `ALLOWED_PROPERTIES` are shown; a slide that is refused, or does not even
open, gets a page that says why.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfed_client.io.inspection_page import Shown, contact_sheet, overlay, page, png
from pathfed_client.io.openslide_reader import OpenSlideReader
from pathfed_client.io.slide_files import Folders, SlideFiles
from pathfed_client.io.slide_listing import list_slides
from pathfed_client.slides.examine import examine, lay_tiles, slide_grid, slide_thumbnail
from pathfed_client.slides.filters import FilteredSlideError, FilterReport, SlideMasks, slide_masks
from pathfed_client.slides.focus import sharpness
from pathfed_client.slides.quality import MPP_BOUNDS
from pathfed_client.slides.reader import Thumbnail
from pathfed_client.slides.tile_map import TileMap
from pathfed_client.slides.tiling import fits
from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError, SiteDataError
from pathfed_common.plan import CohortPlan

#: Tiles on the contact sheet, evenly spread over those of the slide.
CONTACT_TILES = 24
#: um/px assumed for the thumbnail's size alone where the file states none that can be believed.
_GUESSED_MPP = 0.25


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What an inspection found and wrote. For the site's own eyes: it names the slide.

    Attributes:
        slide: its path relative to the slides folder.
        usable: whether it can be trained on.
        code: why not.
        why: the same in words.
        mpp: um/px of level 0 along x and y, as the patient list gives them, or else as the file states them.
        width: level-0 pixels.
        height: level-0 pixels.
        tiles: usable tiles.
        filters: what each filter removed, where there was tissue.
        sharpness: of each tile on the contact sheet, in its order.
        properties: technical properties.
        page: the HTML page.
        overlay: the thumbnail with tissue, ink, folds and tiles, if it could be read.
        contact: the contact sheet, if a tile could be read.
    """

    slide: str
    usable: bool
    code: ErrorCode | None
    why: str | None
    mpp: tuple[float, float] | None
    width: int | None
    height: int | None
    tiles: int
    filters: FilterReport | None
    sharpness: tuple[float, ...]
    properties: dict[str, str]
    page: Path
    overlay: Path | None
    contact: Path | None

    def to_dict(self) -> dict[str, object]:
        """Facts and paths, as `--json` prints them."""
        return asdict(self)


@dataclass
class _Look:
    """What can be seen of a slide; each part may be missing."""

    error: SiteDataError | None = None
    dimensions: tuple[int, int] | None = None
    mpp: tuple[float, float] | None = None
    properties: dict[str, str] = field(default_factory=dict)
    thumbnail: Thumbnail | None = None
    masks: SlideMasks | None = None
    map: TileMap | None = None
    filters: FilterReport | None = None
    tiles: list[NDArray[np.uint8]] = field(default_factory=list)

    @property
    def corners(self) -> NDArray[np.int64]:
        """Of the tiles, level-0 pixels, (n, 2)."""
        return np.empty((0, 2), np.int64) if self.map is None else self.map.corners()

    @property
    def side(self) -> float:
        """Of a tile's source, level-0 pixels."""
        return 0.0 if self.map is None else self.map.grid.source_side


def not_listed(path: str) -> None:
    """No resolution is given for any slide."""


def inspect(
    slides_folder: Folders, name: str, plan: CohortPlan, out: Path, *, listed_mpp: Callable[[str], float | None] = not_listed
) -> Inspection:
    """Look at one slide and write the page.

    Args:
        slides_folder: the site's slides: one folder, or several.
        name: the slide's path relative to the folder, or any name a patient list may give it.
        plan: the cohort rules.
        out: the folder to write into; made if it is not there.
        listed_mpp: asked once, with the slide's path: the resolution that the hospital gives instead of the file's, um/px, or None.

    Raises:
        SiteDataError: no such slide, or a name that several have (PF212).
        HostError: the disk is full (PF901), or the folder cannot be written (PF904).
    """
    slide = _named(slides_folder, name)
    look = _look(slide, plan, listed_mpp(slide.path))
    _make_folder(out)
    values = tuple(round(sharpness(tile), 3) for tile in look.tiles)
    pictures = {
        "overlay": None if look.thumbnail is None else png(overlay(look.thumbnail, look.masks, look.corners, look.side)),
        "contact": png(contact_sheet(look.tiles, values)) if look.tiles else None,
    }
    paths = {key: out / f"{key}.png" for key, data in pictures.items() if data is not None}
    found = Inspection(
        slide=slide.path,
        usable=look.error is None,
        code=None if look.error is None else look.error.code,
        why=None if look.error is None else _words(look.error),
        mpp=look.mpp,
        width=None if look.dimensions is None else look.dimensions[0],
        height=None if look.dimensions is None else look.dimensions[1],
        tiles=len(look.corners) if look.error is None else 0,
        filters=look.filters,
        sharpness=values,
        properties=look.properties,
        page=out / "index.html",
        overlay=paths.get("overlay"),
        contact=paths.get("contact"),
    )
    for key, path in paths.items():
        files.write_atomic(path, pictures[key] or b"", secret=True)
    thumbnail = None if look.thumbnail is None else png(look.thumbnail.pixels)
    shown = Shown(thumbnail=thumbnail, overlay=pictures["overlay"], contact=pictures["contact"])
    files.write_atomic(found.page, page(found.to_dict(), look.filters, shown, plan).encode(), secret=True)
    return found


def _named(folders: Folders, name: str) -> SlideFiles:
    slides = list_slides(folders).slides
    fitting = [slide for slide in slides if slide.path == name] or [slide for slide in slides if name in slide.names]
    if len(fitting) != 1:
        what = "there is no such slide in the slides folder" if not fitting else "several slides have this name"
        raise SiteDataError(
            ErrorCode.SLIDE_MISSING,
            what,
            where=name,
            value=", ".join(slide.path for slide in fitting) or None,
            remedy="give its path relative to the slides folder",
        )
    return fitting[0]


def _look(slide: SlideFiles, plan: CohortPlan, given: float | None) -> _Look:
    """See as much of a slide as can be seen; the first thing that is wrong with it is the verdict's, not the page's."""
    look = _Look()
    try:
        with OpenSlideReader(slide.files[0], name=slide.path, files=slide.files) as reader:
            look.dimensions, look.properties = reader.dimensions, dict(reader.properties)
            look.mpp = reader.mpp if given is None else (given, given)
            _judge(look, reader, plan, slide.path, given)
            _picture(look, reader, plan)
            _read_tiles(look, reader, plan)
    except SiteDataError as error:
        look.error = look.error or error
    except (OSError, MemoryError, ValueError, ArithmeticError) as error:
        # What decoders raise on damaged files they did not foresee, as in a scan.
        look.error = look.error or SiteDataError(ErrorCode.SLIDE_UNREADABLE, f"the slide cannot be read: {error!r}")
    return look


def _judge(look: _Look, reader: OpenSlideReader, plan: CohortPlan, where: str, given: float | None) -> None:
    try:
        facts = examine(reader, plan, where=where, mpp_override=given)
    except FilteredSlideError as error:
        look.error, look.filters = error, error.report
    except SiteDataError as error:
        look.error = error
    else:
        look.filters, look.map = facts.filters, facts.tiles


def _picture(look: _Look, reader: OpenSlideReader, plan: CohortPlan) -> None:
    if look.error is not None and look.error.code is ErrorCode.SLIDE_UNREADABLE:
        return  # its thumbnail would be as broken, and may take minutes to come
    mpp = _believable(look.mpp)
    look.thumbnail = slide_thumbnail(reader, mpp or _GUESSED_MPP)
    if look.error is not None and look.error.code is ErrorCode.SLIDE_NOT_BRIGHTFIELD:
        return  # what is tissue there cannot be told
    look.masks = slide_masks(look.thumbnail, plan.quality)
    if look.map is None and mpp is not None and fits(slide_mpp=mpp, plan=plan):
        # A refused slide shows the tiles it would have had without filters, so that its eyes can judge the filters.
        bare = SlideMasks(look.masks.tissue, *(np.zeros_like(look.masks.tissue) for _ in range(2)))
        look.map, _ = lay_tiles(bare, slide_grid(reader, mpp, plan), look.thumbnail.cell, plan)


def _believable(mpp: tuple[float, float] | None) -> float | None:
    low, high = MPP_BOUNDS
    return None if mpp is None or not (low <= mpp[0] <= high and low <= mpp[1] <= high) else (mpp[0] + mpp[1]) / 2


def _read_tiles(look: _Look, reader: OpenSlideReader, plan: CohortPlan) -> None:
    if look.map is None or len(look.map) == 0:
        return
    grid, corners = look.map.grid, look.corners
    for x, y in corners[np.unique(np.linspace(0, len(corners) - 1, CONTACT_TILES).astype(int))]:
        try:
            pixels = reader.read_region(int(x), int(y), grid.level, grid.crop, grid.crop)
        except SiteDataError:
            continue  # a hole; the verdict has judged how many there are
        if grid.crop != plan.tile_px:
            pixels = np.asarray(Image.fromarray(pixels).resize((plan.tile_px, plan.tile_px), Image.Resampling.BOX))
        look.tiles.append(pixels)


def _words(error: SiteDataError) -> str:
    return error.what if error.value is None else f"{error.what}: {error.value}"


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(ErrorCode.HOME_UNUSABLE, f"the folder cannot be made: {error.strerror}", where=out) from error
