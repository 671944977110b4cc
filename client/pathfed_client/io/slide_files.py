"""The slide files of a folder: what is there, which files make up one slide, and whether a slide has changed."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pathfed_client.slides.dicom_series import HEAD_BYTES, series_uid
from pathfed_common import digest
from pathfed_common.digest import Digest

SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm")
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class SlideFiles:
    """One slide on the disk.

    Attributes:
        path: its name in the site database: relative to the slides folder, forward slashes. A DICOM series that has a folder of its own
            is named by that folder.
        opened: the file to open.
        files: all its files, sorted.
        names: what a patient list may call it.
    """

    path: str
    opened: Path
    files: tuple[Path, ...]
    names: frozenset[str]


@dataclass(frozen=True)
class FileState:
    """Whether a slide changed is told by these.

    Attributes:
        size: bytes, over all files.
        mtime_ns: latest modification, nanoseconds since 1970 UTC.
    """

    size: int
    mtime_ns: int


def find_slides(folder: Path) -> list[SlideFiles]:
    """All slides under a folder, in order of their paths. Hidden files and folders are skipped.

    Raises:
        OSError: a folder cannot be listed.
    """
    found = []
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(place)
        slides = sorted(here / name for name in names if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES)
        dicom = [path for path in slides if path.suffix.lower() == ".dcm"]
        found += [_single(folder, path) for path in slides if path.suffix.lower() != ".dcm"]
        found += _series(folder, here, dicom)
    return sorted(found, key=lambda slide: slide.path)


def _raise(error: OSError) -> None:
    raise error


def _relative(folder: Path, path: Path) -> str:
    """The name of a file; bytes that are no UTF-8 are written as escapes, so that the name can be stored and shown."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def _single(folder: Path, path: Path) -> SlideFiles:
    files = [path]
    if path.suffix.lower() == ".mrxs":
        beside = path.with_suffix("")
        files += sorted(file for file in beside.iterdir() if file.is_file()) if beside.is_dir() else []
    name = _relative(folder, path)
    return SlideFiles(path=name, opened=path, files=tuple(files), names=frozenset({name, name.rpartition("/")[2]}))


def _series(folder: Path, here: Path, files: list[Path]) -> list[SlideFiles]:
    """DICOM files of one folder, by series; a file whose series cannot be told stands alone."""
    groups: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        groups[_uid(path) or str(path)].append(path)
    alone = len(groups) == 1 and here != folder and len(files) > 1
    slides = []
    for members in groups.values():
        paths = [_relative(folder, member) for member in members]
        names = {form for path in paths for form in (path, path.rpartition("/")[2])}
        own = _relative(folder, here) if alone else paths[0]
        if alone:
            names |= {own, own.rpartition("/")[2]}
        slides.append(SlideFiles(path=own, opened=members[0], files=tuple(members), names=frozenset(names)))
    return slides


def _uid(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return series_uid(file.read(HEAD_BYTES))
    except OSError:
        return None  # it stands alone, and opening it will say what is wrong


def file_state(files: Iterable[Path]) -> FileState:
    """Size and time of a slide's files.

    Raises:
        OSError: a file is gone or out of reach.
    """
    states = [path.stat() for path in files]
    return FileState(size=sum(state.st_size for state in states), mtime_ns=max(state.st_mtime_ns for state in states))


def fingerprint(files: Iterable[Path]) -> Digest:
    """Digest of each file's size and of samples from its beginning, middle and end: a slide of gigabytes costs 192 kB of reading.

    Raises:
        OSError: a file cannot be read.
    """
    return digest.of_chunks(part for path in files for part in _samples(path))


def _samples(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        yield f"{size}|".encode()
        for start in sorted({0, max(0, size // 2 - _SAMPLE_BYTES // 2), max(0, size - _SAMPLE_BYTES)}):
            file.seek(start)
            yield file.read(_SAMPLE_BYTES)


def opened_file(folder: Path, path: str) -> tuple[Path, tuple[Path, ...]]:
    """The file to open, and all files, of a slide known by its path in the site database.

    Raises:
        OSError: it is not there any more.
    """
    place = folder / path
    slides = {slide.path: slide for slide in _around(folder, place)}
    if path not in slides:
        raise FileNotFoundError(f"no slide {path}")
    return slides[path].opened, slides[path].files


def _around(folder: Path, place: Path) -> list[SlideFiles]:
    if place.is_dir():
        return _series(folder, place, sorted(file for file in place.iterdir() if _is_dicom(file)))
    if place.suffix.lower() == ".dcm":
        return _series(folder, place.parent, sorted(file for file in place.parent.iterdir() if _is_dicom(file)))
    return [_single(folder, place)]


def _is_dicom(path: Path) -> bool:
    return path.suffix.lower() == ".dcm" and not path.name.startswith(".")
