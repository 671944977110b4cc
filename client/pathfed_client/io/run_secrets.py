"""Secrets of runs: one chain for each run, ratcheted forward round by round.

The secret of a run's round keys that round's sampling and noise (`KeyedRandom`). The chain of a run is forked from the site's root:

    run secret, round 1  =  HKDF(root, "run", run)         root  <-  HKDF(root, "next")
    run secret, round r+1 = HKDF(run secret, round r, "next")

Guarantees:
    - **A later theft denoises nothing.** `advance` is called once a round's sealed update is durable; the secret it was made with is then
      overwritten and gone. The root moves on with every fork, so that what is on the disk gives no earlier secret of any run.
    - **A crash changes nothing.** Until `advance`, `current` gives the same secret, so a recomputed round is the same release. Each step
      replaces a file whole or not at all. A crash in the middle of a fork leaves a run that names the root it came from: before its
      secret is given out, the root moves on. A crash between replacing a secret and overwriting the old one leaves the old one under a
      second name, by which it is overwritten when the folder is opened.
    - **A past round is refused**, never recomputed with other noise under the same name.
    - `secret_id` names a secret without giving it away. Put it into what names the release: where a chain was lost and forked anew,
      the same round is then another release with a charge of its own.

Files are readable by their owner only, in a folder of their own, to be left out of backups: restored from a backup, old secrets would
be back. Overwriting reaches the old blocks on file systems that write in place; on flash disks and copy-on-write file systems full-disk
encryption has to do the rest.
"""

import contextlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pathfed_common import digest, files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, TransportError
from pathfed_common.ids import RunName, run_name
from pathfed_common.privacy.randomness import SECRET_BYTES, hkdf

_SALT = b"pathfed/run-secrets/1"
_ROOT = "root.secret"


@dataclass(frozen=True, repr=False)
class _Link:
    """One place in a chain: the secret of a round."""

    round_index: int
    secret: bytes

    def next(self) -> "_Link":
        return _Link(self.round_index + 1, _next(self.secret))


class RunSecrets:
    """The site's run secrets, in a folder of their own. One process uses the folder at a time."""

    def __init__(self, folder: Path) -> None:
        """Open a folder made by `create`; what a crash left half-written there is erased."""
        self._folder = folder
        for part in folder.glob(".*.part"):
            _drop(part)

    @classmethod
    def create(cls, folder: Path, *, root: bytes | None = None) -> Self:
        """Make the folder (mode 0700) and the site's root secret.

        Args:
            folder: must not hold a root secret yet.
            root: 32 bytes for tests with fixed secrets; from the operating system's random source when None.

        Raises:
            HostError: PF904, the folder cannot be made or holds a root secret already.
            ValueError: `root` is not 32 bytes long.
        """
        root = secrets.token_bytes(SECRET_BYTES) if root is None else root
        if len(root) != SECRET_BYTES:
            raise ValueError(f"root must be {SECRET_BYTES} bytes, got {len(root)}")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise files.disk_error(error, folder) from error
        path = folder / _ROOT
        if path.exists():
            raise HostError(ErrorCode.HOME_UNUSABLE, "the folder holds a root secret already", where=path, remedy="choose another folder")
        files.write_atomic(path, root, secret=True)
        return cls(folder)

    def __repr__(self) -> str:
        return f"RunSecrets({str(self._folder)!r})"

    def current(self, run: RunName, round_index: int) -> bytes:
        """The 32-byte secret of a run's round, the same until `advance`; moves the chain forward over rounds that were missed.

        Raises:
            TransportError: PF409, the round is past and its secret erased.
            HostError: PF906, a key file is missing, damaged or readable by others; a PF9xx when the disk fails.
            ValueError: round_index is below 1, or the run's name is not one.
        """
        _check_round(round_index)
        link = self._read(run) or self._fork(run)
        if link.round_index > round_index:
            raise TransportError(
                ErrorCode.ROUND_OUT_OF_ORDER,
                "the round is past: its secret was erased when its update was sealed",
                where=run,
                value=f"round {round_index}, the chain is at {link.round_index}",
                remedy="send the sealed update, or train the next round",
            )
        return self._forward(run, link, round_index).secret

    def advance(self, run: RunName, round_index: int) -> None:
        """Erase a round's secret and move to the next round's. Call it once the round's sealed update is durable; again is harmless.

        Raises:
            HostError: PF906 or another PF9xx, see `current`.
            ValueError: the run has no chain, round_index is below 1, or the run's name is not one.
        """
        _check_round(round_index)
        link = self._read(run)
        if link is None:
            raise ValueError(f"run {run!r} has no chain: no round of it was trained here")
        self._forward(run, link, round_index + 1)

    def settle(self, run: RunName, round_index: int) -> None:
        """Erase a sealed round's secret, where a crash came before `advance` could; nothing to do where it, or the whole chain, is gone.

        Raises:
            HostError: PF906 or another PF9xx, see `current`.
            ValueError: round_index is below 1, or the run's name is not one.
        """
        _check_round(round_index)
        link = self._read(run)
        if link is not None:
            self._forward(run, link, round_index + 1)

    def _forward(self, run: RunName, link: _Link, round_index: int) -> _Link:
        if link.round_index >= round_index:
            return link
        while link.round_index < round_index:
            link = link.next()
        self._write(run, link)
        return link

    def _fork(self, run: RunName) -> _Link:
        """Start a run's chain: its file first, which names the root, then the next root. Nobody has the secret before both are there."""
        root = self._root()
        link = _Link(1, hkdf(root, salt=_SALT, info=b"run" + digest.canonical(run)))
        self._write(run, link, forked_from=secret_id(root))
        self._leave(secret_id(root))
        return link

    def _root(self) -> bytes:
        root = files.read_secret(self._folder / _ROOT)
        if len(root) != SECRET_BYTES:
            raise HostError(ErrorCode.KEY_FILE, "the root secret is not 32 bytes long", where=self._folder / _ROOT)
        return root

    def _leave(self, forked_from: Digest) -> None:
        """Move the root on, where it is still the one that a run came from."""
        root = self._root()
        if secret_id(root) == forked_from:
            _replace(self._folder / _ROOT, _next(root))

    def _read(self, run: RunName) -> _Link | None:
        path = self._path(run)
        if not path.exists():
            return None
        try:
            raw = json.loads(files.read_secret(path))
            link, forked_from = _Link(raw["round"], bytes.fromhex(raw["secret"])), raw.get("forked_from")
            if raw["run"] != run or not isinstance(link.round_index, int) or link.round_index < 1 or len(link.secret) != SECRET_BYTES:
                raise ValueError("fields out of bounds")
        except (ValueError, TypeError, KeyError):
            # Nothing of the file's content is shown.
            raise HostError(ErrorCode.KEY_FILE, "not the secret of this run", where=path) from None
        if forked_from is not None:
            self._leave(forked_from)
        return link

    def _write(self, run: RunName, link: _Link, *, forked_from: Digest | None = None) -> None:
        """Write a run's file. `forked_from`: the root it came from, while that may still be there; later rounds say nothing of it."""
        content = {"run": run, "round": link.round_index, "secret": link.secret.hex()}
        _replace(self._path(run), digest.canonical(content if forked_from is None else {**content, "forked_from": forked_from}))

    def _path(self, run: RunName) -> Path:
        return self._folder / f"run-{run_name(run)}.secret"


def secret_id(secret: bytes) -> Digest:
    """A name for a secret that gives nothing of it away."""
    return digest.of_bytes(hkdf(secret, salt=_SALT, info=b"name"))


def _next(secret: bytes) -> bytes:
    return hkdf(secret, salt=_SALT, info=b"next")


def _check_round(round_index: int) -> None:
    if round_index < 1:
        raise ValueError(f"round_index must be at least 1, got {round_index}")


def _replace(path: Path, data: bytes) -> None:
    """Replace a secret file atomically, then overwrite the blocks of the old one, which the open handle still reaches."""
    if not path.exists():
        files.write_atomic(path, data, secret=True)
        return
    second = path.with_name(f".{path.name}.old.part")
    try:
        _drop(second)
        with path.open("r+b") as old:
            with contextlib.suppress(OSError):  # a file system without links: there, a crash leaves the old blocks
                os.link(path, second)
            files.write_atomic(path, data, secret=True)
            _overwrite(old.fileno())
        second.unlink(missing_ok=True)
    except OSError as error:
        raise files.disk_error(error, path) from error


def _drop(part: Path) -> None:
    """Remove what a crash left; its blocks are overwritten, unless they are those of a secret that counts, under a second name."""
    with contextlib.suppress(FileNotFoundError):
        if part.stat().st_nlink == 1:
            with part.open("r+b") as file:
                _overwrite(file.fileno())
        part.unlink()


def _overwrite(handle: int) -> None:
    os.pwrite(handle, bytes(os.fstat(handle).st_size), 0)
    os.fsync(handle)
