"""Where a run's files lie in the server's home, and the spool of admitted updates.

    runs/<run>/states/round-000001.safetensors        state after round 1; round-000000 is the initial one
    runs/<run>/optimiser/round-000001.safetensors     server optimiser after round 1; the last two are kept
    runs/<run>/spool/round-000002/incoming/           updates that are arriving (rounds.uploads); parts outlive every crash
    runs/<run>/spool/round-000002/admitted/           <site>.safetensors, .dsse (statement), .json (when it came)
    quarantine/<run>/round-000002/                    <site>-<digest>.safetensors and .dsse

An admitted update stays in the spool until its round is committed. A later attempt at the round finds it there and admits it again, with
all checks, so nothing rests on the spool being whole or honest.
"""

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.files import make_folder, sync_folder, write_atomic
from pathfed_common.ids import RunName, SiteName
from pathfed_common.part_file import file_digest
from pathfed_server.rounds.admission import read_chunks
from pathfed_server.rounds.ports import Reply
from pathfed_server.rounds.state import Quarantined


@dataclass(frozen=True)
class RunFiles:
    """The files of one run under the server's home."""

    home: Path
    run: RunName

    def state(self, round_index: int) -> Path:
        """The state after a round."""
        return self._folder("states") / _name(round_index, ".safetensors")

    def optimiser(self, round_index: int) -> Path:
        """The server optimiser after a round."""
        return self._folder("optimiser") / _name(round_index, ".safetensors")

    def spool(self, round_index: int) -> Path:
        """The round's spool folder."""
        return self._folder("spool") / _name(round_index, "")

    def incoming(self, round_index: int) -> Path:
        """Where the round's updates arrive."""
        return self.spool(round_index) / "incoming"

    def quarantine(self, round_index: int) -> Path:
        """Where the round's refused updates go."""
        return self.home / "quarantine" / self.run / _name(round_index, "")

    def relative(self, path: Path) -> str:
        """A path as the database keeps it: relative to the home, with forward slashes."""
        return path.relative_to(self.home).as_posix()

    def prepare(self, round_index: int) -> Path:
        """Make the round's folders; the one that updates arrive in, with what has arrived in an earlier attempt at the round."""
        for folder in (self.state(0).parent, self.optimiser(0).parent, self.spool(round_index) / "admitted"):
            make_folder(folder)
        make_folder(self.incoming(round_index))
        return self.incoming(round_index)

    def sweep(self, committed: int) -> None:
        """Delete what no later round needs: spools of rounds up to `committed`, and optimiser files older than the one before it."""
        for index, folder in _numbered(self._folder("spool")):
            if index <= committed:
                shutil.rmtree(folder, ignore_errors=True)
        for index, file in _numbered(self._folder("optimiser")):
            if index < committed - 1:
                file.unlink(missing_ok=True)

    def keep(self, round_index: int, reply: Reply) -> Path:
        """Put an admitted reply into the spool; the update's new place.

        Raises:
            HostError: the disk is full (PF901) or cannot be written (PF904).
            ValueError: the reply holds no update.
        """
        if reply.update is None or reply.statement is None:
            raise ValueError("only a reply with an update and a statement can be kept")
        update, statement, arrival = self._kept(round_index, reply.site)
        write_atomic(arrival, digest.canonical({"received_at": reply.received_at, "transfer_s": reply.transfer_s}))
        write_atomic(statement, reply.statement)
        if reply.update != update:
            os.replace(reply.update, update)
            sync_folder(update.parent)
        return update

    def kept(self, round_index: int, site: SiteName) -> Reply | None:
        """The site's reply of an earlier attempt at the round, not yet checked again; None when there is none or it is not whole."""
        update, statement, arrival = self._kept(round_index, site)
        try:
            times = json.loads(arrival.read_bytes())
            received_at, transfer_s = float(times["received_at"]), float(times["transfer_s"])
            envelope = statement.read_bytes()
        except (OSError, ValueError, KeyError, TypeError):
            return None  # the site is simply asked again, and sends the same bytes
        if not update.is_file():
            return None
        return Reply(site=site, code=None, statement=envelope, update=update, received_at=received_at, transfer_s=transfer_s)

    def discard(self, round_index: int, site: SiteName) -> None:
        """Remove a kept reply."""
        for path in self._kept(round_index, site):
            path.unlink(missing_ok=True)

    def set_aside(self, round_index: int, reply: Reply) -> tuple[Path, Digest, int]:
        """Move a refused update, and its statement, into quarantine: its new place, digest and length.

        Raises:
            HostError: the disk is full (PF901) or cannot be written (PF904).
            ValueError: the reply holds no update.
        """
        if reply.update is None:
            raise ValueError("there is nothing to set aside")
        found, size = file_digest(reply.update), reply.update.stat().st_size
        folder = self.quarantine(round_index)
        make_folder(folder)
        place = folder / f"{reply.site}-{digest.short(found)}.safetensors"
        if reply.statement is not None:
            write_atomic(place.with_suffix(".dsse"), reply.statement)
        os.replace(reply.update, place)
        sync_folder(folder)
        return place, found, size

    def released(self, aside: Quarantined) -> Reply | None:
        """A quarantined update that counts all the same, as a reply whose file is a copy; None where it is not whole any more.

        Raises:
            HostError: the disk is full (PF901) or cannot be written (PF904).
        """
        kept = self.home / aside.path
        copy = self.spool(aside.round_index) / "incoming" / f"{aside.site}.released"
        try:
            envelope = kept.with_suffix(".dsse").read_bytes()
            if digest.of_chunks(read_chunks(kept)) != aside.update:
                return None
        except OSError:
            return None
        write_atomic(copy, read_chunks(kept))
        return Reply(site=aside.site, code=None, statement=envelope, update=copy, received_at=aside.at, transfer_s=0.0)

    def _folder(self, kind: str) -> Path:
        return self.home / "runs" / self.run / kind

    def _kept(self, round_index: int, site: SiteName) -> tuple[Path, Path, Path]:
        folder = self.spool(round_index) / "admitted"
        return folder / f"{site}.safetensors", folder / f"{site}.dsse", folder / f"{site}.json"


def _name(round_index: int, ending: str) -> str:
    return f"round-{round_index:06d}{ending}"


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob("round-*"):
        with contextlib.suppress(ValueError):
            found.append((int(path.name.removeprefix("round-").split(".")[0]), path))
    return found
