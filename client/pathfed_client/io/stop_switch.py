"""The site's stop switch: a file in the home, there or not there.

A file, because it must work when nothing else does: with a database that is locked or damaged, with a client that hangs, by hand
(`touch stopped`) if need be. Whatever is there under this name means stop, whether or not it can be read.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pathfed_common import files
from pathfed_common.errors import ErrorCode, HostError, TransportError

NAME = "stopped"


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why the site stands still.

    Attributes:
        at: UTC seconds since when, or None where the file does not say.
        reason: what was given as the reason; stays at the site.
    """

    at: float | None
    reason: str


@dataclass(frozen=True)
class StopSwitch:
    """The switch of the home at `home`."""

    home: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.home / NAME

    @property
    def is_on(self) -> bool:
        """Whether the site is stopped. What cannot be looked at counts as stopped."""
        try:
            os.lstat(self.path)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def stop(self) -> Stop | None:
        """Since when and why, or None while the site may answer."""
        if not self.is_on:
            return None
        try:
            raw = json.loads(self.path.read_bytes())
            return Stop(at=float(raw["at"]), reason=str(raw["reason"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return Stop(at=None, reason="")

    def throw(self, *, at: float, reason: str) -> None:
        """Stop. Throwing it again keeps the first time and reason.

        Raises:
            HostError: PF904, the home cannot be written.
        """
        if self.is_on:
            return
        try:
            self.path.touch()  # stopped from here on; an empty file fits on a full disk
        except OSError as error:
            raise files.disk_error(error, self.path) from error
        with suppress(HostError):  # then nothing but the reason is missing
            files.write_atomic(self.path, json.dumps({"at": at, "reason": reason}).encode())

    def release(self) -> None:
        """Go on; nothing happens where nothing was stopped.

        Raises:
            HostError: PF904, the file cannot be removed.
        """
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise files.disk_error(error, self.path) from error

    def check(self) -> None:
        """Refuse to go on while the site is stopped.

        Raises:
            TransportError: PF440, it is.
        """
        if self.is_on:
            raise TransportError(
                ErrorCode.SITE_STOPPED,
                "this site was stopped by its own people",
                where=self.path,
                remedy="`pathfed-site resume` lets it answer again",
            )
