"""What operators order, over a real home: refusals by code, and a record that verifies after sites took turns, joined and left."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_run import finish_run
from record_fixtures import small_preset

from pathfed_common import digest
from pathfed_common.errors import PathfedError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.verify import verify_record
from pathfed_server import app, orders
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.rounds.state import Checkpoint, Participation, ParticipationState, Quarantined, RoundOpening, RunState

RUN = RunName("run-1")
SITES = ("site-a", "site-b", "site-c", "site-d")


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    torch.set_num_threads(1)
    with small_preset():
        yield


def code(call: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(PathfedError) as caught:
        call(*arguments, **options)
    return caught.value.code.value


@pytest.fixture
def sites(member: Callable[[str], Any]) -> dict[str, Any]:
    return {name: member(name) for name in SITES}


def planned(home: ServerHome, plan_file: Path, sites: dict[str, Any], *, more: str = "", names: tuple[str, ...] = SITES) -> digest.Digest:
    """A planned run over some of the enrolled sites; all but the last have approved."""
    plan_file.write_text(plan_file.read_text() + more)
    plan = app.publish_plan(home.root, plan_file, plan_file.with_suffix(".dsse"))
    for name, site in sites.items():
        app.add_site(home.root, site.card)
        if name in names:
            app.add_word(home.root, site.approve(plan.digest))
    app.start_run(home.root, plan.digest, RUN, [])
    return plan.digest


def verified(home: ServerHome, keys: dict[SiteName, SigningKey]) -> Any:
    trusted = TrustedKeys(server=home.evidence_key.public, sites={site: key.public for site, key in keys.items()})
    verdict = verify_record(home.record(RUN), trusted=trusted)
    verdict.require()
    return verdict


def test_record_of_a_run_whose_sites_took_turns_and_left_verifies(server_home: ServerHome, plan_file: Path, sites: dict[str, Any]) -> None:
    planned(server_home, plan_file, sites, more="ask_at_most = 2\n")
    orders.change_sites(server_home.root, RUN, add=[], remove=[SiteName("site-d")])
    keys = {SiteName(name): site.key for name, site in sites.items()}
    finish_run(server_home, RUN, keys, declared=8)
    verified(server_home, keys)
    with SqlStore(server_home.database_url) as store:
        rounds = [{str(one.site): one.code for one in store.participations(RUN, index)} for index in (1, 2, 3)]
    assert all(found["site-d"] == "PF564" for found in rounds)
    assert sorted(name for found in rounds for name in SITES if found[name] is None) == sorted(["site-a", "site-b", "site-c"] * 2)


def test_a_site_that_joins_has_approved_and_its_card_is_in_the_record(
    server_home: ServerHome, plan_file: Path, sites: dict[str, Any]
) -> None:
    plan = planned(server_home, plan_file, sites, names=SITES[:3])
    root, new = server_home.root, SiteName("site-d")
    assert code(orders.change_sites, root, RUN, add=[new], remove=[]) == "PF407"
    assert code(orders.change_sites, root, RUN, add=[SiteName("none")], remove=[]) == "PF501"
    assert code(orders.change_sites, root, RUN, add=[], remove=[SiteName(name) for name in SITES[:2]]) == "PF503"
    assert code(orders.change_sites, root, RunName("none"), add=[], remove=[]) == "PF510"
    app.add_word(root, sites["site-d"].approve(plan))
    assert orders.change_sites(root, RUN, add=[new], remove=[SiteName("site-a")]) == ("site-b", "site-c", "site-d")
    keys = {SiteName(name): site.key for name, site in sites.items()}
    finish_run(server_home, RUN, keys, declared=8)
    assert {site.site for site in verified(server_home, keys).sites} == {"site-b", "site-c", "site-d"}
    assert code(orders.change_sites, root, RUN, add=[], remove=[new]) == "PF511"
    assert code(orders.pause_run, root, RUN) == code(orders.drain_run, root, RUN) == code(orders.resume_run, root, RUN) == "PF511"


def test_a_revoked_site_does_not_join(server_home: ServerHome, plan_file: Path, sites: dict[str, Any]) -> None:
    planned(server_home, plan_file, sites)
    orders.change_sites(server_home.root, RUN, add=[], remove=[SiteName("site-d")])
    with SqlStore(server_home.database_url) as store:
        store.revoke_site(SiteName("site-d"), at=2e9)
    assert code(orders.change_sites, server_home.root, RUN, add=[SiteName("site-d")], remove=[]) == "PF518"


def test_orders_go_from_state_to_state(server_home: ServerHome, plan_file: Path, sites: dict[str, Any]) -> None:
    planned(server_home, plan_file, sites)
    root = server_home.root
    assert orders.pause_run(root, RUN) is RunState.PAUSED
    assert orders.pause_run(root, RUN, now=True) is RunState.PAUSED
    assert orders.resume_run(root, RUN) is RunState.PLANNED
    assert orders.resume_run(root, RUN) is RunState.PLANNED
    assert orders.drain_run(root, RUN) is RunState.STOPPED
    assert code(orders.pause_run, root, RUN) == "PF511"
    for order in (orders.pause_run, orders.drain_run, orders.stop_run, orders.resume_run):
        assert code(order, root, RunName("none")) == "PF510"


@pytest.fixture
def set_aside(server_home: ServerHome, plan_file: Path, sites: dict[str, Any]) -> Path:
    """The file of an update that was refused for its norm, in a round that is open."""
    plan = planned(server_home, plan_file, sites)
    state = digest.of_bytes(b"state")
    first = {"state": state, "state_path": "s", "state_bytes": 1, "optimiser": state, "optimiser_path": "o", "optimiser_bytes": 1}
    place = server_home.root / "quarantine" / "x.safetensors"
    place.parent.mkdir()
    place.write_bytes(b"update")
    assert plan
    with SqlStore(server_home.database_url) as store:
        store.begin_attempt(RUN, at=1.0)
        store.commit_initial(RUN, 1, Checkpoint(round_index=0, **first), at=1.0)  # type: ignore[arg-type]
        asked = (Participation(site=SiteName("site-a"), state=ParticipationState.OFFERED, offered_at=1.0),)
        store.open_round(
            RoundOpening(run=RUN, attempt=1, round_index=1, base_state=state, participations=asked, offered_at=1.0, deadline=2.0)
        )
        store.note_quarantine(
            1,
            Quarantined(
                run=RUN,
                round_index=1,
                site=SiteName("site-a"),
                code="PF508",
                update=digest.of_bytes(b"update"),
                update_bytes=6,
                path="quarantine/x.safetensors",
                at=1.5,
            ),
        )
    return place


def test_quarantine_is_listed_shown_and_released(server_cli: Any, server_home: ServerHome, set_aside: Path) -> None:
    home = ("--home", server_home.root, "--json")
    (row,) = server_cli("quarantine", "list", *home).json
    assert (row["entry"], row["site"], row["code"], row["released_at"]) == (1, "site-a", "PF508", None)
    assert server_cli("quarantine", "list", RUN, *home).json == [row]
    assert server_cli("quarantine", "list", "none", *home).code == "PF510"
    assert server_cli("quarantine", "show", "1", *home).json["file_is_whole"] is True
    assert server_cli("quarantine", "show", "2", *home).code == "PF567"
    assert server_cli("quarantine", "release", "2", "--reason", "r", *home).code == "PF567"
    kept = set_aside.read_bytes()
    set_aside.write_bytes(b"Update")
    assert server_cli("quarantine", "show", "1", *home).json["file_is_whole"] is False
    assert server_cli("quarantine", "release", "1", "--reason", "r", *home).code == "PF566"
    set_aside.write_bytes(kept)
    assert server_cli("quarantine", "release", "1", *home).status == 2, "a reason is asked for"
    done = server_cli("quarantine", "release", "1", "--reason", "scanner", *home).json
    assert (done["entry"], done["released_by"]) == (1, "operator")
    assert server_cli("quarantine", "show", "1", *home).json["release_reason"] == "scanner"
    people = server_cli("quarantine", "list", *home[:2])
    assert "PF508" in people.out


def test_sites_are_reinstated_by_name(server_cli: Any, server_home: ServerHome, set_aside: Path) -> None:
    home = ("--home", server_home.root, "--json")
    with SqlStore(server_home.database_url) as store:
        row = Participation(site=SiteName("site-a"), state=ParticipationState.REFUSED, code="PF507", offered_at=1.0)
        store.note_participation(RUN, 1, 1, row, at=1.5)
        assert store.suspend_sites(RUN, 1, after=1, at=3.0) == ["site-a"]
    assert server_cli("sites", "list", *home).json[0]["suspended_at"] == 3.0
    assert server_cli("sites", "reinstate", "site-a", *home).json == {"site": "site-a", "suspended": False}
    assert server_cli("sites", "list", *home).json[0]["suspended_at"] is None
    assert server_cli("sites", "reinstate", "none", *home).code == "PF501"


def test_run_verbs_say_the_state(server_cli: Any, server_home: ServerHome, plan_file: Path, sites: dict[str, Any]) -> None:
    planned(server_home, plan_file, sites)
    home = ("--home", server_home.root, "--json")
    for words, state in (
        (("pause", "run-1"), "paused"),
        (("resume", "run-1"), "planned"),
        (("pause", "run-1", "--now"), "paused"),
        (("drain", "run-1"), "stopped"),
        (("stop", "run-1"), "stopped"),
    ):
        assert server_cli("run", *words, *home).json == {"run": "run-1", "state": state}
    left = server_cli("run", "sites", "run-1", "--remove", "site-a", "--remove", "site-b", *home)
    assert left.json == {"run": "run-1", "sites": ["site-c", "site-d"]}
    assert server_cli("run", "sites", "run-1", "--add", "../x", *home).code == "PF905"
    assert server_cli("run", "pause", "run-1", *home).code == "PF511"
