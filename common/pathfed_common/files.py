"""Files that are whole or absent: the only module of `common` that touches a disk (docs/decisions/0005).

Everything written through here is first written beside its place, flushed to the disk, and then renamed, so that a reader sees the old
file or the new one, never a part.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from pathfed_common.errors import ErrorCode, HostError, PathfedError

_OWNER_ONLY = 0o600
_OWNER_FOLDER = 0o700
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, data: bytes | Iterable[bytes], *, secret: bool = False) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut.

    Args:
        path: where the file goes; its folder must exist.
        data: the bytes, or a stream of them.
        secret: the file is readable by its owner alone (0600) from the moment it exists.

    Raises:
        HostError: the disk is full (PF901), or the folder cannot be written (PF904).
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    chunks = [data] if isinstance(data, bytes) else data
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _OWNER_ONLY if secret else 0o644)
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def create_folder(root: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder and all that belongs in it, whole or not at all.

    Args:
        root: the folder; it must not exist, or be empty.
        fill: writes the contents into an empty folder (mode 0700) that becomes `root` when it returns.

    Raises:
        HostError: PF904, something is there already, it cannot be written, or it is the current folder, which cannot be exchanged under
            the running command; PF901, the disk is full.
    """
    if root.resolve() == Path.cwd():
        raise HostError(ErrorCode.HOME_UNUSABLE, "the current folder cannot be used", where=root.resolve(), remedy="name a folder below it")
    part = root.with_name(f".{root.name}.{os.getpid()}.part")
    try:
        if root.exists() and any(root.iterdir()):
            raise HostError(
                ErrorCode.HOME_UNUSABLE, "something is there already and is left as it is", where=root, remedy="choose another folder"
            )
        part.mkdir(parents=True, mode=_OWNER_FOLDER)
        fill(part)
        if root.exists():
            root.rmdir()
        part.rename(root)
        sync_folder(root.parent)
    except OSError as error:
        raise disk_error(error, root) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(part)


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make a folder, and those above it that are missing, so that they survive a power cut; one that is there stays as it is.

    Args:
        folder: the folder.
        mode: of the folders that are made, before the process's mask.

    Raises:
        OSError: it cannot be made.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=mode, exist_ok=True)
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_secret(path: Path) -> bytes:
    """Read a key file, refusing one that others may read.

    Raises:
        HostError: missing, unreadable, or its mode lets group or others in (PF906).
    """
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise HostError(
                ErrorCode.KEY_FILE, "a key file may be readable by its owner only", where=path, value=oct(mode), remedy=f"chmod 600 {path}"
            )
        return path.read_bytes()
    except OSError as error:
        raise HostError(ErrorCode.KEY_FILE, f"the key file cannot be read: {error.strerror}", where=path) from error


def read_given(path: Path) -> bytes:
    """Read a file that a person handed over or named.

    Raises:
        HostError: PF904, it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise HostError(ErrorCode.HOME_UNUSABLE, f"cannot be read: {error.strerror}", where=path) from None


def disk_error(error: OSError, path: Path) -> PathfedError:
    """The pathfed error for an operating-system error met while writing `path`."""
    if error.errno in _FULL:
        return HostError(
            ErrorCode.DISK_FULL,
            "the disk is full; nothing was half-written",
            where=path,
            remedy="free space there and run the command again",
        )
    return HostError(ErrorCode.HOME_UNUSABLE, f"cannot write: {error.strerror}", where=path)
