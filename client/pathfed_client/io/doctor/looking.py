"""Looking at folders, patient list, home and speed. Nothing is written, and nothing that is wrong raises: it is what was looked for."""

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pathfed_client.io.doctor.seen import FoldersSeen, KeySeen, ListSeen, SpeedSeen
from pathfed_client.io.doctor.slides import Look
from pathfed_client.io.listing import read_listing
from pathfed_client.io.slide_files import Folders, SlideFiles, check_folders, labelled
from pathfed_client.io.slide_listing import list_slides
from pathfed_client.io.tile_workers import CHUNK, TileJob, TileWorkers
from pathfed_common.errors import SiteDataError

_GROUP_AND_OTHERS = 0o077


def look_at_folders(folders: Folders) -> tuple[FoldersSeen, tuple[SlideFiles, ...]]:
    """List the slide folders; the slides beside what was seen."""
    places = labelled(folders)
    try:
        check_folders(list(places.values()))
    except SiteDataError:
        return FoldersSeen(folders=len(places), overlap=True), ()
    listing = list_slides(folders)
    whole = {f"{label}//" if label else "" for label in places}
    away = sum(place in whole for place in listing.unlisted)
    seen = FoldersSeen(folders=len(places), away=away, slides=len(listing.slides), unlisted=tuple(sorted(listing.unlisted)))
    return seen, listing.slides


def look_at_list(path: Path, slides: Sequence[SlideFiles], columns: Mapping[str, str]) -> tuple[ListSeen, tuple[SlideFiles, ...]]:
    """Lay the patient list against the slides; those with a patient beside what was seen.

    Args:
        path: the list.
        slides: all slides that are there.
        columns: configured headers, see `cohort.list_file.read_table`.
    """
    try:
        listing = read_listing(path, {slide.path: slide.names for slide in slides}, columns)
    except SiteDataError as error:
        return ListSeen(slides=len(slides), code=error.code), ()
    placed = listing.matching.slides
    seen = ListSeen(
        slides=len(slides),
        mapped=len(placed),
        missing=len(listing.matching.missing),
        ambiguous=len(listing.matching.ambiguous),
        unmapped=tuple(slide.path for slide in slides if slide.path not in placed),
        doubts=tuple(finding.code for finding in listing.findings),
    )
    return seen, tuple(slide for slide in slides if slide.path in placed)


def look_at_keys(root: Path, folders: Sequence[str], needed: Sequence[str]) -> tuple[KeySeen, ...]:
    """The modes of folders of keys and of all files in them.

    Args:
        root: the home.
        folders: their names in it.
        needed: files that must be there, relative to the home.
    """
    inside = (f"{folder}/{name}" for folder in folders for name in _names(root / folder))
    return tuple(_key(root, name) for name in sorted({*folders, *needed, *inside}))


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _key(root: Path, name: str) -> KeySeen:
    try:
        mode = (root / name).stat().st_mode
    except OSError:
        return KeySeen(name, there=False, exposed=False)
    return KeySeen(name, there=True, exposed=bool(mode & _GROUP_AND_OTHERS))


def free_bytes(folder: Path) -> int:
    """Bytes this user may still write there."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def measure_speed(
    folders: Folders, looks: Sequence[Look], *, tile_px: int, tiles_per_slide: int, workers: int, seconds: float
) -> SpeedSeen | None:
    """Read tiles with the processes that a round reads with. Each slide is opened anew for its few tiles, as at a site of very many.

    Args:
        folders: the slide folders.
        looks: what looking at the sample gave.
        tile_px: side of a tile, pixels.
        tiles_per_slide: read one after the other from a slide, as for a drawn patient.
        workers: reading processes.
        seconds: how long, beyond which no more is begun. At least one order is read.

    Returns:
        None where no slide of the sample has tiles.
    """
    able = [look for look in looks if look.source is not None and look.places]
    if not able:
        return None
    jobs = _jobs(able, tiles_per_slide)
    read = failed = 0
    with TileWorkers(folders, tile_px, workers, open_slides=1) as reading:
        for _ in range(workers):
            reading.order(list(itertools.islice(jobs, CHUNK)))
        for _ in range(workers):
            reading.collect(None)  # the processes are up, and the decoders loaded
        ahead = 2 * workers
        began = time.monotonic()
        for _ in range(ahead):
            reading.order(list(itertools.islice(jobs, CHUNK)))
        while ahead:
            was_read = reading.collect(None)
            read, failed, ahead = read + sum(was_read), failed + len(was_read) - sum(was_read), ahead - 1
            if time.monotonic() - began < seconds:
                reading.order(list(itertools.islice(jobs, CHUNK)))
                ahead += 1
        took = time.monotonic() - began
    return SpeedSeen(slides=len(able), tiles=read, failed=failed, seconds=took, workers=workers)


def _jobs(looks: Sequence[Look], tiles_per_slide: int) -> Iterator[TileJob]:
    """Tiles without end: a few of each slide in turn."""
    places = [itertools.cycle(look.places) for look in looks]
    while True:
        for look, own in zip(looks, places, strict=True):
            for x, y in itertools.islice(own, tiles_per_slide):
                if look.source is not None:
                    yield TileJob(look.source, x, y)
