"""What this site has cosigned last of the transparency log, in a file that lies beside the run secrets, out of backups.

It is written before the cosignature leaves, and never goes back: a site that forgot what it had cosigned could be led to cosign a second
history. So the file is made once, when the home is enrolled, and its absence means something: a home restored without it.
"""

import json
from pathlib import Path
from typing import Self

from pathfed_common import digest, files
from pathfed_common.errors import ErrorCode, TransportError
from pathfed_common.provenance.log_witness import Head

_NAME = "log-head"


class LogHeadFile:
    """The log's head as this site knows it, replaced whole."""

    def __init__(self, folder: Path) -> None:
        """Use the file in `folder`; nothing is read yet."""
        self._path = folder / _NAME

    @classmethod
    def create(cls, folder: Path) -> Self:
        """Begin with a log of which nothing was cosigned.

        Raises:
            HostError: PF901, PF904, it cannot be written.
        """
        made = cls(folder)
        files.write_atomic(made._path, digest.canonical({"size": 0, "root": ""}), secret=True)
        return made

    def exists(self) -> bool:
        """Whether the file is there."""
        return self._path.exists()

    def read(self) -> Head | None:
        """What was cosigned last; None: nothing yet.

        Raises:
            TransportError: PF436, the file is missing or was changed.
        """
        try:
            raw = json.loads(self._path.read_bytes())
            size, root = int(raw["size"]), bytes.fromhex(raw["root"])
            if size < 0 or (size == 0) != (root == b""):
                raise ValueError("size and root do not fit")
        except OSError as error:
            raise self._lost(f"cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise self._lost(f"was changed: {error}") from None
        return Head(size, root) if size else None

    def keep(self, head: Head) -> None:
        """Remember a head; on the disk when this returns.

        Raises:
            ValueError: it is smaller than what is remembered.
            TransportError: PF436, see `read`.
            HostError: PF901, PF904, it cannot be written; the earlier one is still there.
        """
        last = self.read()
        if last is not None and head.size < last.size:
            raise ValueError(f"a head of {head.size} leaves after one of {last.size}")
        files.write_atomic(self._path, digest.canonical({"size": head.size, "root": head.root.hex()}), secret=True)

    def _lost(self, what: str) -> TransportError:
        return TransportError(ErrorCode.LOG_HEAD_LOST, f"what this site has cosigned last {what}", where=self._path)
