"""A site whose machine loses power between any two writes of a round answers it with the same bytes, charged once.

The site's folder is copied as it stands after every write of a round that nothing disturbs; each copy is what a machine would find when it
is switched on again. And the order of the writes is watched: what counts rests on bytes that are on the disk (`durable`).
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from answering_site import OFFERED_AT, bytes_of, opened
from durable import Journal

from pathfed_client import app
from pathfed_client.home import SiteHome
from pathfed_client.io.egress_log import EgressLog
from pathfed_client.io.ledger_head import HeadFile
from pathfed_client.io.run_secrets import RunSecrets
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest

#: `make chaos` continues from every copy, the ordinary run from some.
FULL = os.environ.get("CHAOS") == "full"
#: Everything that changes the site's disk in a round, beside renames and flushes.
_WRITES = ((SiteStore, "append"), (HeadFile, "keep"), (SiteStore, "put_sealed"), (RunSecrets, "advance"), (EgressLog, "append"))


class Disks:
    """Copies of a site's folder, one for each state it stood in."""

    def __init__(self, home: SiteHome, folder: Path) -> None:
        self._home, self._folder = home.root, folder
        self._known: set[str] = set()
        self.copies: list[tuple[str, Path]] = []

    def copy(self, after: str) -> None:
        """Copy the folder, where it has changed."""
        files = sorted(path for path in self._home.rglob("*") if path.is_file() and not path.name.endswith("-shm"))
        state = digest.of_value([[str(path.relative_to(self._home)), digest.of_bytes(path.read_bytes())] for path in files])
        if state not in self._known:
            self._known.add(state)
            place = self._folder / f"disk-{len(self.copies)}"
            shutil.copytree(self._home, place)
            self.copies.append((after, place))

    @contextmanager
    def at_every_write(self) -> Iterator[None]:
        """Copy after every write."""
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (*_WRITES, (os, "fsync"), (os, "replace"), (os, "link"), (os, "unlink")):
                patch.setattr(owner, name, self._copying(name, getattr(owner, name)))
            yield

    def _copying(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            self.copy(name)
            return result

        return done


def test_every_disk_that_power_loss_can_leave_answers_with_the_same_bytes_charged_once(world, copy_home, tmp_path) -> None:
    home = copy_home()
    disks = Disks(home, tmp_path)
    disks.copy("nothing")
    with opened(home) as site, disks.at_every_write():
        undisturbed = bytes_of(site.answer(world.offer(), world.base_state))
    assert len(disks.copies) >= 12, [after for after, _ in disks.copies]
    for after, place in disks.copies if FULL else disks.copies[1::4]:
        with opened(SiteHome(place)) as site:
            answer = site.answer(world.offer(), world.base_state)
            assert bytes_of(answer) == undisturbed, after
            assert len(app.open_ledger(site.home, site.store).verify()) == 1, after
            secrets = sorted(path.name for path in site.home.run_secrets.iterdir())
            assert secrets == ["ledger-head", "root.secret", "run-run-1.secret"], (after, secrets)


def test_what_counts_at_a_site_rests_on_what_is_flushed(world, copy_home) -> None:
    home = copy_home()
    with opened(home) as site, Journal(home.root).watching(*_WRITES) as journal:
        for index in (1, 2):
            times = {"offered_at": OFFERED_AT + 100 * index, "deadline": OFFERED_AT + 100 * index + 60}
            site.clock.time = OFFERED_AT + 100 * index + 1
            bytes_of(site.answer(world.offer(round_index=index, **times), world.base_state))
    assert journal.wrong == []
    assert {name for _, name in _WRITES} == set(journal.counted)
    assert journal.renamed >= 8
