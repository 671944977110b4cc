"""A site whose disk fills at any write of a round: a code, nothing half-written, and with space again the same answer, charged once."""

from contextlib import suppress
from typing import Any

import pytest
from answering_site import Site, bytes_of, opened
from full_disk import WITHIN_S, full_disk, tried

from pathfed_client import app
from pathfed_client.gate.ports import Answer
from pathfed_client.home import SiteHome
from pathfed_client.io.egress_log import EgressLog
from pathfed_common.errors import HostError

pytestmark = pytest.mark.timeout(WITHIN_S)


def answers_again(home: SiteHome, world: Any) -> Answer:
    """What the site answers when it is started anew. Its ledger has been verified."""
    with opened(SiteHome(home.root)) as later:
        app.open_ledger(later.home, later.store).verify()
        return later.answer(world.offer(), world.base_state)


def asked(site: Site, world: Any) -> str | None:
    """The code that the site answers with, or that it dies of without an answer; None: it answered."""
    try:
        return site.answer(world.offer(), world.base_state).code
    except HostError as error:
        return error.code.value


def check_nothing_half_written(home: SiteHome) -> None:
    # A replaced secret keeps a second name until its blocks are overwritten.
    assert [path.name for path in home.root.rglob("*.part") if not path.name.endswith(".old.part")] == []
    with suppress(FileNotFoundError), EgressLog(home.egress) as record:
        record.verified()


@pytest.mark.parametrize("once", [False, True], ids=["full from then on", "full for a moment"])
def test_a_disk_that_fills_at_any_write_of_a_round_costs_a_code_and_no_answer(world, copy_home, tmp_path, quick, once: bool) -> None:
    with full_disk(tmp_path) as disk:
        with opened(copy_home("undisturbed")) as site:
            disk.fill(None)
            undisturbed = bytes_of(site.answer(world.offer(), world.base_state))
        writes = list(disk.seen)
        assert len(writes) > 30
        wrong = {}
        for number, write in tried(writes, once=once):
            if "fetched.safetensors" in write:
                continue  # the test's own bulk plane
            home = copy_home(f"home-{number}")
            with opened(home) as site:
                disk.fill(number, once=once)
                code = asked(site, world)
                disk.free()
                check_nothing_half_written(home)
                again = site.answer(world.offer(), world.base_state)
                found = (code, again.code, again.code is None and bytes_of(again) == undisturbed, site.charges())
            same = answers_again(home, world) == again
            # A second name for a secret's file is done without where it cannot be had.
            expected = None if once and write.startswith("link ") else "PF901"
            if (*found, same) != (expected, None, True, 1, True):
                wrong[f"{number} {write}"] = (*found, same)
        assert wrong == {}
