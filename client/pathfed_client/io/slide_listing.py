"""Listing slide folders: every slide below them, each as one value, with one look at each file.

- A folder that cannot be listed, at the top or below, is told apart from one that is empty: nothing is concluded about what it holds.
- Hidden files and folders are skipped. Links to folders are followed after everything that is really there, and no folder is entered
  twice, so a loop of links ends.
- Formats of several files are one slide: MIRAX with its folder, Hamamatsu VMS and VMU with the files that they name, a DICOM series
  with all its files, wherever below the folder they lie. Files without a suffix, or with a number for one, are DICOM if they begin so.
- Label and macro images are left alone: a VMS slide's macro file does not count as a part of it.
"""

import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathfed_client.io.slide_files import (
    LED_SUFFIXES,
    SUFFIXES,
    UNREACHED,
    FileState,
    Folders,
    SlideFiles,
    joint_state,
    labelled,
    placed,
    raw,
    shown,
)
from pathfed_client.slides.dicom_series import HEAD_BYTES, is_dicom, series_uid
from pathfed_common.errors import ErrorCode, SiteDataError

_INDEX_BYTES = 1 << 16
_SHORT_HEAD = 1 << 12
_VMS_PARTS = ("imagefile", "mapfile", "optimisationfile")

#: Series of the DICOM files seen before, by path, size and time; None for files that are no DICOM.
Heads = dict[tuple[str, FileState], str | None]


@dataclass(frozen=True)
class Listing:
    """What lies in a site's slide folders.

    Attributes:
        slides: in order of their paths.
        unlisted: folders that could not be listed, as slides are named (`""` or `NAME//` for a whole one), with the reason.
    """

    slides: tuple[SlideFiles, ...]
    unlisted: dict[str, str]

    @property
    def names(self) -> dict[str, frozenset[str]]:
        """Of each slide by its path: what a patient list may call it."""
        return {slide.path: slide.names for slide in self.slides}


def list_slides(folders: Folders, heads: Heads | None = None) -> Listing:
    """All slides of the site's folders.

    Args:
        folders: one or several; several are named as `slide_files` says.
        heads: kept by the caller between listings so that a DICOM file's head is read once.
    """
    slides: list[SlideFiles] = []
    unlisted: dict[str, str] = {}
    for label, folder in labelled(folders).items():
        walk = _Walk(folder, label, {} if heads is None else heads)
        slides += walk.slides()
        unlisted |= {_place(label, relative): reason for relative, reason in walk.unlisted.items()}
    return Listing(tuple(sorted(slides, key=lambda slide: slide.path)), unlisted)


def no_slide(unlisted: Mapping[str, str], folders: Sequence[Path]) -> SiteDataError:
    """The error for folders without any slide: PF201.

    Args:
        unlisted: see `Listing`.
        folders: all that were listed.
    """
    where, why = next(((raw(place) or "", text) for place, text in unlisted.items()), ("", "there is no slide"))
    return SiteDataError(ErrorCode.SLIDE_FOLDER_EMPTY, f"there is no slide in the slides folder: {why}", where=where or folders[0])


def _place(label: str, relative: str) -> str:
    return placed(label, relative) if relative or label else ""


@dataclass
class _Found:
    """A file that may be a slide."""

    name: str
    state: FileState


@dataclass
class _Walk:
    """One folder being listed. Relative paths are raw here, as the system gives them."""

    root: Path
    label: str
    heads: Heads
    unlisted: dict[str, str] = field(default_factory=dict)
    _entered: set[tuple[int, int]] = field(default_factory=set)
    _dicom: dict[str, tuple[FileState, str | None]] = field(default_factory=dict)

    def slides(self) -> Iterator[SlideFiles]:
        """Every slide, in no order."""
        real, links = deque([""]), deque[str]()
        while real or links:
            relative = real.popleft() if real else links.popleft()
            try:
                yield from self._folder(relative, real, links)
            except OSError as error:
                self.unlisted[shown(relative)] = error.strerror or "cannot be listed"
        yield from self._series()

    def _folder(self, relative: str, real: deque[str], links: deque[str]) -> list[SlideFiles]:
        """The slides of one folder but for DICOM, which is gathered; its folders are appended."""
        place = self.root / relative
        identity = place.stat()
        if (identity.st_dev, identity.st_ino) in self._entered:
            return []
        self._entered.add((identity.st_dev, identity.st_ino))
        inside: list[str] = []
        aside: list[str] = []
        files: list[_Found] = []
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _leads(entry.is_dir):
                    (aside if entry.is_symlink() else inside).append(entry.name)
                elif _may_be_slide(entry.name) and _leads(entry.is_file):
                    files.append(_Found(entry.name, _state(entry)))
        led = [self._led(relative, found) for found in files if _suffix(found.name) in LED_SUFFIXES]
        parts = {part for slide, own in led for part in own}
        companions = {Path(found.name).stem for found in files if _suffix(found.name) == ".mrxs"}
        real.extend(_join(relative, name) for name in sorted(inside) if name not in companions)
        links.extend(_join(relative, name) for name in sorted(aside) if name not in companions)
        for found in files:
            self._note_dicom(_join(relative, found.name), found.state)
        plain = [found for found in files if _suffix(found.name) in SUFFIXES[:-1] and found.name not in parts]
        plain = [found for found in plain if _suffix(found.name) not in LED_SUFFIXES]
        return [slide for slide, _ in led] + [self._slide(_join(relative, found.name), (), found.state) for found in plain]

    def _slide(self, relative: str, parts: tuple[str, ...], state: FileState) -> SlideFiles:
        return SlideFiles(placed(self.label, shown(relative)), self.root, tuple(shown(part) for part in parts), state)

    def _led(self, relative: str, found: _Found) -> tuple[SlideFiles, set[str]]:
        """A slide of several files that one of them leads, and those names in the same folder that are parts of it."""
        first = _join(relative, found.name)
        try:
            if _suffix(found.name) == ".mrxs":
                beside = Path(first).with_suffix("").as_posix()
                own, inside = set[str](), self.root / beside
                rest = (
                    [_join(beside, name) for name in sorted(part.name for part in inside.iterdir() if part.is_file())]
                    if inside.is_dir()
                    else []
                )
            else:
                own = _named_parts(self.root / first)
                rest = [_join(relative, name) for name in sorted(own) if (self.root / relative / name).is_file()]
            state = joint_state([(self.root / name).stat() for name in (first, *rest)])
        except OSError:
            return self._slide(first, (), UNREACHED), set()
        return self._slide(first, (first, *rest) if rest else (), state), own

    def _note_dicom(self, relative: str, state: FileState) -> None:
        """Remember a file that is DICOM by its suffix, or by its first bytes where it has none."""
        suffix = _suffix(relative)
        if suffix in SUFFIXES[:-1]:
            return
        key = (str(self.root / relative), state)
        if key not in self.heads:
            self.heads[key] = _series_of(self.root / relative)
        series = self.heads[key]
        if series is not None or suffix == ".dcm":
            self._dicom[relative] = (state, series or None)

    def _series(self) -> Iterator[SlideFiles]:
        """Each series as one slide; a DICOM file whose series cannot be told stands alone."""
        groups: defaultdict[str, list[str]] = defaultdict(list)
        below: Counter[str] = Counter()
        for relative, (_, series) in self._dicom.items():
            groups[series or f"/{relative}"].append(relative)
            steps = relative.split("/")
            below.update("/".join(steps[:depth]) for depth in range(len(steps)))
        for members in groups.values():
            members.sort()
            states = [self._dicom[member][0] for member in members]
            state = UNREACHED
            if UNREACHED not in states:
                state = FileState(sum(one.size for one in states), max(one.mtime_ns for one in states))
            common = (
                os.path.commonpath([member.rpartition("/")[0] or "." for member in members]).removeprefix(".") if len(members) > 1 else ""
            )
            named = common if common and below[common] == len(members) else members[0]
            yield self._slide(named, tuple(members) if len(members) > 1 else (), state)


def _join(relative: str, name: str) -> str:
    return f"{relative}/{name}" if relative else name


def _suffix(name: str) -> str:
    """As `PurePath.suffix` has it, in lower case; asked for every file."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") + 1 else ""


def _may_be_slide(name: str) -> bool:
    suffix = _suffix(name)
    return suffix in SUFFIXES or ((suffix == "" or suffix[1:].isdigit()) and name.upper() != "DICOMDIR")


def _leads(ask: Callable[[], bool]) -> bool:
    """What an entry is; a link that leads in a circle is nothing."""
    try:
        return ask()
    except OSError:
        return False


def _state(entry: "os.DirEntry[str]") -> FileState:
    try:
        return joint_state([entry.stat()])
    except OSError:
        return UNREACHED  # it stands in the listing, and opening it will say what is wrong


def _series_of(path: Path) -> str | None:
    """The series of a DICOM file, empty when it cannot be told; None when this is no DICOM file or cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_SHORT_HEAD)
            if not is_dicom(head):
                return None
            return series_uid(head) or series_uid(head + file.read(HEAD_BYTES - len(head))) or ""
    except OSError:
        return None


def _named_parts(index: Path) -> set[str]:
    """The files beside a VMS or VMU index that hold its pixels: plain names only."""
    with index.open("rb") as file:
        text = os.fsdecode(file.read(_INDEX_BYTES))
    names = set()
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key.strip().lower().split("(")[0] in _VMS_PARTS and value.strip() and "/" not in value and "\0" not in value:
            names.add(value.strip())
    return names - {".", ".."}
