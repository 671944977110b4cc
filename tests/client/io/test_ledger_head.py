"""The head file and the real database: torn writes, databases put back, and a process killed at every point of a charge."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pathfed_client.budget.ledger import Ledger
from pathfed_client.gate.site_policy import SitePolicy
from pathfed_client.io.ledger_head import HeadFile, site_ledger
from pathfed_client.io.site_store import SiteStore
from pathfed_common import digest
from pathfed_common.errors import ErrorCode, HostError, PathfedError, PrivacyError
from pathfed_common.ids import run_name
from pathfed_common.privacy.accounting import PrivacyEvent
from pathfed_common.provenance.keys import SigningKey

KEY = SigningKey.generate()
POLICY = SitePolicy(max_epsilon=100.0, delta=1e-6)
EVENT = PrivacyEvent(sampling_rate=0.1, noise_multiplier=3.0, steps=1)


class Killed(BaseException):
    """The process is gone: nothing catches it."""


def charge(ledger: Ledger, number: int) -> int:
    return ledger.charge(
        release_id=digest.of_value(number),
        plan=digest.of_bytes(b"plan"),
        run=run_name("run-1"),
        round_index=number,
        event=EVENT,
        plan_delta=1e-6,
        plan_limit=100.0,
        now=1000.0 + number,
    ).sequence


class Home:
    """A database and a folder of secrets."""

    def __init__(self, root: Path) -> None:
        self.root, self.database, self.secrets = root, root / "site.db", root / "secrets"
        self.store = SiteStore(self.database)
        self.ledger = site_ledger(self.store, KEY, POLICY, self.secrets)

    def reopened(self) -> "Home":
        self.store.close()
        return Home(self.root)

    def put_back(self, copy: Path) -> "Home":
        """Replace the database by a copy of an earlier one, as a restore does: its write-ahead log goes."""
        self.store.close()
        for part in self.root.glob("site.db*"):
            part.unlink()
        for part in copy.iterdir():
            shutil.copy(part, self.root)
        return Home(self.root)

    def copied(self, to: Path) -> Path:
        """A copy of the database as it stands."""
        to.mkdir()
        with closing(sqlite3.connect(self.database)) as source, closing(sqlite3.connect(to / "site.db")) as target:
            source.backup(target)
        return to


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    (tmp_path / "home" / "secrets").mkdir(parents=True)
    HeadFile.create(tmp_path / "home" / "secrets")
    made = Home(tmp_path / "home")
    yield made
    made.store.close()


def test_a_charge_is_in_the_head_file_before_it_returns_and_only_its_owner_reads_it(home: Home) -> None:
    for number in (1, 2, 3):
        charge(home.ledger, number)
        (seen,) = HeadFile(home.secrets).heads()
        assert (seen.sequence, seen.head) == (number, home.ledger.head)
    assert (home.secrets / "ledger-head").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in home.secrets.iterdir()] == ["ledger-head"]


def refused(home: Home, code: ErrorCode, stored: int | None) -> None:
    """Nothing can be read, and nothing is charged."""
    for call in (home.ledger.verify, home.ledger.entries, home.ledger.spent, lambda: charge(home.ledger, 99)):
        with pytest.raises(PrivacyError) as caught:
            call()
        assert caught.value.code is code
        assert caught.value.remedy
    if stored is not None:
        assert len(home.store.entries()) == stored


def test_a_database_put_back_is_found_though_its_chain_is_whole(home: Home, tmp_path: Path) -> None:
    charge(home.ledger, 1)
    older = home.copied(tmp_path / "backup")
    charge(home.ledger, 2)
    back = home.put_back(older)
    refused(back, ErrorCode.LEDGER_BEHIND, stored=1)
    back.store.close()


def test_a_database_that_is_gone_or_emptied_is_found(home: Home) -> None:
    charge(home.ledger, 1)
    for remains in (None, b""):
        home.store.close()
        for part in home.root.glob("site.db*"):
            part.unlink()
        if remains is not None:
            home.database.write_bytes(remains)
        home = Home(home.root)
        refused(home, ErrorCode.LEDGER_BEHIND, stored=0)
    home.store.close()


def test_the_end_of_a_torn_write_ahead_log_is_dropped_by_sqlite_and_missed_by_the_head_file(home: Home, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        charge(home.ledger, number)
    torn = tmp_path / "torn"
    torn.mkdir()
    for name in ("site.db", "site.db-wal"):  # as they lie on the disk: the last frames are not in the database file yet
        shutil.copy(home.root / name, torn)
    log = torn / "site.db-wal"
    log.write_bytes(log.read_bytes()[:-100])
    back = home.put_back(torn)
    assert len(back.store.entries()) == 2, "SQLite itself says nothing"
    refused(back, ErrorCode.LEDGER_BEHIND, stored=2)
    back.store.close()


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9], ids=lambda keep: f"{keep:.0%} of the file")
def test_a_truncated_database_file_is_told_and_charges_nothing(home: Home, tmp_path: Path, keep: float) -> None:
    for number in (1, 2, 3):
        charge(home.ledger, number)
    torn = home.copied(tmp_path / "torn")
    data = (torn / "site.db").read_bytes()
    (torn / "site.db").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(HostError, match=r"PF904.*damaged.*do: "):
        home.put_back(torn)


def test_overwritten_pages_of_the_ledger_are_told_and_charge_nothing(home: Home) -> None:
    for number in (1, 2, 3):
        charge(home.ledger, number)
    home.store.close()
    with closing(sqlite3.connect(home.database)) as database:
        size = database.execute("PRAGMA page_size").fetchone()[0]
        page = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ledger_entry'").fetchone()[0]
    with home.database.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes(size))
    again = Home(home.root)
    refused(again, ErrorCode.LEDGER_DAMAGED, stored=None)
    again.store.close()


@pytest.mark.parametrize("content", [None, b"", b'{"head":null,"sequ', b'{"head":null,"sequence":3}', b"[]", b"\xff"])
def test_a_head_file_that_is_missing_or_changed_refuses(home: Home, content: bytes | None) -> None:
    charge(home.ledger, 1)
    (home.secrets / "ledger-head").unlink()
    if content is not None:
        (home.secrets / "ledger-head").write_bytes(content)
    refused(home, ErrorCode.LEDGER_UNWITNESSED, stored=1)


# A process killed at every point of a charge. What must hold: the site is not locked out, what was charged is charged once, and a database
# put back is found from the moment on at which something may have been released.

Plant = Callable[[Home, pytest.MonkeyPatch], None]


def _dies() -> None:
    raise Killed


def before_the_entry_is_stored(home: Home, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(home.store, "append", lambda sequence, entry: _dies())


def while_the_entry_is_stored(home: Home, patch: pytest.MonkeyPatch) -> None:
    real = SiteStore.append

    def append(sequence: int, entry: bytes) -> None:
        with home.store.together():  # the insert is done, the commit is not
            real(home.store, sequence, entry)
            _dies()

    patch.setattr(home.store, "append", append)


def after_the_entry_is_stored(home: Home, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HeadFile, "keep", lambda *_: _dies())


def while_the_head_is_written(home: Home, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "replace", lambda *_: _dies())


def after_the_head_is_written(home: Home, patch: pytest.MonkeyPatch) -> None:
    real = HeadFile.keep

    def keep(self: HeadFile, *head: object) -> None:
        real(self, *head)  # type: ignore[arg-type]
        _dies()

    patch.setattr(HeadFile, "keep", keep)


POINTS: list[tuple[Plant, int]] = [
    (before_the_entry_is_stored, 1),
    (while_the_entry_is_stored, 1),
    (after_the_entry_is_stored, 2),
    (while_the_head_is_written, 2),
    (after_the_head_is_written, 2),
]


@pytest.mark.parametrize(("plant", "stored"), POINTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_charge_killed_at_any_point_locks_nobody_out_and_is_charged_once(
    home: Home, plant: Plant, stored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    charge(home.ledger, 1)
    with monkeypatch.context() as patch:
        plant(home, patch)
        with pytest.raises(Killed):
            charge(home.ledger, 2)
    again = home.reopened()
    assert len(again.ledger.verify()) == stored
    assert charge(again.ledger, 2) == 2, "the same release is asked for again"
    (seen,) = HeadFile(again.secrets).heads()
    assert (seen.sequence, seen.head) == (2, again.ledger.head), "its head is kept before it may be released"
    assert charge(again.ledger, 3) == 3
    assert len(again.ledger.verify()) == 3
    again.store.close()


@pytest.mark.parametrize("follow", [2, 3], ids=["the same release again", "another release"])
@pytest.mark.parametrize(("plant", "stored"), POINTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_database_put_back_after_a_kill_is_found_once_anything_was_released(
    home: Home, plant: Plant, stored: int, follow: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charge(home.ledger, 1)
    older = home.copied(tmp_path / "backup")
    with monkeypatch.context() as patch:
        plant(home, patch)
        with pytest.raises(Killed):
            charge(home.ledger, 2)
    again = home.reopened()
    charge(again.ledger, follow)  # returned: may be released
    back = again.put_back(older)
    refused(back, ErrorCode.LEDGER_BEHIND, stored=1)
    back.store.close()


def test_the_order_that_would_lock_a_site_out_does(home: Home) -> None:
    """Planted fault: head first, entry second, killed in between. It shows why a charge keeps the other order."""
    charge(home.ledger, 1)
    HeadFile(home.secrets).keep(digest.of_bytes(b"entry 2, never stored"), 2)
    with pytest.raises(PrivacyError, match="PF309"):
        charge(home.reopened().ledger, 2)


def test_a_head_that_cannot_be_written_releases_nothing_and_the_charge_can_be_asked_for_again(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    charge(home.ledger, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(PathfedError, match="PF901"):
            charge(home.ledger, 2)
    assert charge(home.ledger, 2) == 2
    assert len(home.ledger.verify()) == 2


_CHARGING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_ledger_head as here
from pathfed_common.provenance.keys import SigningKey
here.KEY = SigningKey.from_pem(Path(sys.argv[3]).read_bytes())
home = here.Home(Path(sys.argv[1]))
for number in range(1, 100_000):
    print(here.charge(home.ledger, number), flush=True)
"""


def test_a_real_process_killed_while_it_charges_loses_nothing_that_it_reported(home: Home, tmp_path: Path) -> None:
    home.store.close()
    (tmp_path / "key.pem").write_bytes(KEY.to_pem())
    arguments = [str(home.root), str(Path(__file__).parent), str(tmp_path / "key.pem")]
    with subprocess.Popen([sys.executable, "-c", _CHARGING, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reported = 0
        for line in process.stdout:
            reported = int(line)
            if reported == 25:
                process.send_signal(signal.SIGKILL)
    assert reported >= 25
    again = Home(home.root)
    stored = len(again.ledger.verify())
    assert stored in (reported, reported + 1)
    assert charge(again.ledger, 1) == 1
    assert charge(again.ledger, stored + 1) == stored + 1
    again.store.close()
