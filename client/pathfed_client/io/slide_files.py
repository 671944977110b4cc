r"""The slide files of one or several folders: what is there, which files make up one slide, and whether a slide has changed.

A slide is named by its path relative to its folder, with forward slashes. Where a site has several folders, the name of the folder and
`//` come first: `archive//2019/a.svs`. Two folders of one name are told apart in the order of the settings: `archive`, `archive~2`.
No relative path holds `//`, so no two slides share a name. Bytes of a name that are no UTF-8, control characters and backslashes are
written as `\xNN`, which can be undone: the name of a slide leads back to its file.
"""

import hmac
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_common.privacy.randomness import hkdf

#: What OpenSlide 4.0.1 opens: Aperio, DICOM, Hamamatsu, Huron, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, Zeiss, generic TIFF.
SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm")
#: Formats of several files whose first file names the slide.
LED_SUFFIXES = (".mrxs", ".vms", ".vmu")
#: One folder with slides, or several.
Folders = Path | Sequence[Path]

_SAMPLE_BYTES = 1 << 16
_ODD = re.compile(r"[\\\x00-\x1f\x7f\udc80-\udcff]")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class FileState:
    """Whether a slide changed is told by these.

    Attributes:
        size: bytes, over all files.
        mtime_ns: latest modification, nanoseconds since 1970 UTC.
    """

    size: int
    mtime_ns: int


#: Of a slide that could not be reached.
UNREACHED = FileState(size=0, mtime_ns=0)


@dataclass(frozen=True, slots=True)
class SlideFiles:
    """One slide on the disk.

    Attributes:
        path: its name in the site database, see above. A DICOM series that has a folder to itself is named by that folder.
        root: the folder it was found in.
        parts: its files relative to `root`, the one to open first; empty for a slide of one file that `path` names.
        state: as found when the folder was listed.
    """

    path: str
    root: Path
    parts: tuple[str, ...]
    state: FileState

    @property
    def files(self) -> tuple[Path, ...]:
        """All its files, the one to open first."""
        return _files(self.root, self.path, self.parts)

    @property
    def opened(self) -> Path:
        """The file to open."""
        return self.files[0]

    @property
    def names(self) -> frozenset[str]:
        """What a patient list may call it."""
        return slide_names(self.path, self.parts)


def labelled(folders: Folders) -> dict[str, Path]:
    """Each folder by what its slides' names begin with: nothing where there is one folder."""
    if isinstance(folders, Path):
        return {"": folders}
    if len(folders) == 1:
        return {"": folders[0]}
    labels: dict[str, Path] = {}
    for folder in folders:
        label, number = shown(folder.name) or "root", 1
        while (label if number == 1 else f"{label}~{number}") in labels:
            number += 1
        labels[label if number == 1 else f"{label}~{number}"] = folder
    return labels


def check_folders(folders: Sequence[Path]) -> None:
    """Refuse folders that are equal or lie inside each other: their slides would be found twice.

    Raises:
        SiteDataError: PF217.
    """
    real = [(Path(os.path.realpath(folder)), folder) for folder in folders]
    for index, (first, given) in enumerate(real):
        for second, other in real[index + 1 :]:
            if first == second or first in second.parents or second in first.parents:
                raise SiteDataError(
                    ErrorCode.SLIDE_FOLDERS_OVERLAP,
                    "two slide folders are one, or one lies inside the other",
                    where=given,
                    value=other,
                    remedy="name the outer folder only: folders are searched with all that is below them",
                )


def shown(name: str) -> str:
    """A file name as it is stored and shown; `raw` undoes it."""
    return _ODD.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", name)


def raw(name: str) -> str:
    """The file name behind a stored one."""

    def byte(found: re.Match[str]) -> str:
        value = int(found[1], 16)
        return chr(value if value < 0x80 else 0xDC00 + value)

    return _ESCAPE.sub(byte, name)


def placed(label: str, relative: str) -> str:
    """The name of a slide in the site database."""
    return f"{label}//{relative}" if label else relative


def slide_names(path: str, parts: Sequence[str]) -> frozenset[str]:
    """What a patient list may call a slide: its whole name, its path in its folder, its last part; a series also by any of its files."""
    relative = path.rpartition("//")[2]
    series = parts if parts and not parts[0].lower().endswith(LED_SUFFIXES) else ()
    forms = {path} | {form for name in (relative, *series) for form in (name, name.rpartition("/")[2])}
    return frozenset(forms | {form.replace("\\x5c", "\\") for form in forms})


def opened_file(folders: Folders, path: str, parts: Sequence[str] = ()) -> tuple[Path, tuple[Path, ...]]:
    """The file to open, and all files, of a slide known by its name in the site database. Looks at no disk.

    Raises:
        OSError: its folder is no longer one of the site's.
    """
    root = labelled(folders).get(path.rpartition("//")[0])
    if root is None:
        raise FileNotFoundError(f"no folder of slide {path}")
    files = _files(root, path, parts)
    return files[0], files


def _files(root: Path, path: str, parts: Sequence[str]) -> tuple[Path, ...]:
    return tuple(root / raw(part) for part in parts or (path.rpartition("//")[2],))


def file_state(files: Iterable[Path]) -> FileState:
    """Size and time of a slide's files.

    Raises:
        OSError: a file is gone or out of reach.
    """
    return joint_state([path.stat() for path in files])


def joint_state(states: Sequence[os.stat_result]) -> FileState:
    """Size and time of several files together."""
    return FileState(size=sum(state.st_size for state in states), mtime_ns=max(state.st_mtime_ns for state in states))


def fingerprint_key(pseudonym_key: bytes) -> bytes:
    """The key of this site's fingerprints, derived from its pseudonym key, so that no key serves two purposes."""
    return hkdf(pseudonym_key, salt=b"pathfed/site-keys/1", info=b"slide-fingerprint")


def fingerprint(files: Iterable[Path], key: bytes) -> str:
    """HMAC-SHA256 of each file's size and of samples from its beginning, middle and end: a slide of gigabytes costs 192 kB of reading.

    Names and the order of files do not count, so that a moved slide is known again; without the key a fingerprint tells nobody whether
    the site has a given slide.

    Raises:
        OSError: a file cannot be read.
    """
    each = sorted(_of_file(path, key) for path in files)
    return "hmac-sha256:" + hmac.digest(key, b"slide" + b"".join(each), "sha256").hex()


def _of_file(path: Path, key: bytes) -> bytes:
    state = hmac.new(key, b"file", "sha256")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        state.update(f"{size}|".encode())
        for start in sorted({0, max(0, size // 2 - _SAMPLE_BYTES // 2), max(0, size - _SAMPLE_BYTES)}):
            file.seek(start)
            state.update(file.read(_SAMPLE_BYTES))
    return state.digest()


def under(path: str, places: Mapping[str, object]) -> bool:
    """Whether a slide's name lies in one of these places, which are names of folders as slides are named, `""` for everything."""
    if "" in places or path in places:
        return True
    label, mark, relative = path.rpartition("//")
    prefix = label + mark
    if prefix in places:
        return True
    steps = relative.split("/")
    return any(prefix + "/".join(steps[:depth]) in places for depth in range(1, len(steps)))
