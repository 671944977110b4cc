"""Releases of a real finished run: what is refused and with which code, what waits for whom, and that what is written verifies."""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_run import cosign, finish_run
from record_fixtures import small_preset

from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import record, release
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import origin_of
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.release_verify import verify_release
from pathfed_server import app, releasing
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.home import ServerHome
from pathfed_server.provenance.log_keeper import LogKeeper
from pathfed_server.provenance.release import prepare, write_bundle
from pathfed_server.rounds.replay import replay_states

RUN = RunName("run-1")
DECLARED = 8

Keys = dict[SiteName, SigningKey]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    torch.set_num_threads(1)
    with small_preset():
        yield


@pytest.fixture
def planned(server_home: ServerHome, plan_file: Path, member: Callable[[str], Any]) -> Keys:
    """A run that is planned; the keys of its three sites."""
    plan = app.publish_plan(server_home.root, plan_file, plan_file.with_suffix(".dsse"))
    keys: Keys = {}
    for name in ("site-a", "site-b", "site-c"):
        site = member(name)
        keys[site.name] = site.key
        app.add_site(server_home.root, site.card)
        app.add_word(server_home.root, site.approve(plan.digest))
    app.start_run(server_home.root, plan.digest, RUN, [])
    return keys


@pytest.fixture
def finished(server_home: ServerHome, planned: Keys) -> Keys:
    finish_run(server_home, RUN, planned, declared=DECLARED)
    return planned


def _trusted(home: ServerHome, keys: Keys) -> TrustedKeys:
    return TrustedKeys(server=home.evidence_key.public, sites={site: key.public for site, key in keys.items()})


def _refused(home: ServerHome, out: Path, **options: Any) -> ProvenanceError:
    with pytest.raises(ProvenanceError) as caught:
        releasing.create_release(home, RUN, out, **options)
    assert not out.exists()
    return caught.value


def test_a_release_waits_for_a_quorum_and_then_verifies(server_home: ServerHome, finished: Keys, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    error = _refused(server_home, out)
    assert error.code is ErrorCode.QUORUM_MISSING
    assert error.value == "0 of 3; missing: site-a, site-b, site-c"
    first, second, third = finished
    cosign(server_home, {first: finished[first]})
    error = _refused(server_home, out)
    assert error.code is ErrorCode.QUORUM_MISSING
    assert error.value == "1 of 3; missing: site-b, site-c"
    (waiting,) = releasing.list_releases(server_home)
    assert waiting["missing"] == ["site-b", "site-c"]
    cosign(server_home, {second: finished[second]})
    made = releasing.create_release(server_home, RUN, out)
    assert made.updates == (9, 9)
    (listed,) = releasing.list_releases(server_home)
    assert (listed["release"], listed["run"], listed["missing"]) == (made.digest, RUN, [])
    verdict = verify_release(out, _trusted(server_home, finished))
    assert verdict.findings == ()
    assert verdict.identities_proven
    assert verdict.cosigned == {first, second}
    assert third in verdict.enrolled
    assert not list((out / "states").glob("round-000[12]*"))
    assert not (out / "updates").exists()


def test_a_replay_of_the_retained_updates_gives_every_state_of_the_loop(server_home: ServerHome, finished: Keys, tmp_path: Path) -> None:
    folder = server_home.record(RUN)
    with SqlStore(server_home.database_url) as store:
        found = store.plan(store.run(RUN).plan).plan()
    states = replay_states(
        found,
        [sorted(finished)] * 3,
        lambda index, site: folder / record.update_path(index, site),
        first=folder / record.state_path(0),
        work=tmp_path,
    )
    rounds = 0
    for replayed in states:
        rounds = replayed.round_index
        assert replayed.state.read_bytes() == (folder / record.state_path(rounds)).read_bytes()
    assert rounds == 3


def test_the_same_release_is_made_again_and_another_one_beside_it(server_home: ServerHome, finished: Keys, tmp_path: Path) -> None:
    _refused(server_home, tmp_path / "first")
    cosign(server_home, finished)
    made = releasing.create_release(server_home, RUN, tmp_path / "first", archive=tmp_path / "first.tar")
    again = releasing.create_release(server_home, RUN, tmp_path / "second", archive=tmp_path / "second.tar")
    assert made.digest == again.digest
    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()
    assert len(releasing.list_releases(server_home)) == 1
    figures = tmp_path / "figures.json"
    figures.write_text('{"kNN": 0.9}')
    assert _refused(server_home, tmp_path / "third", evaluation=figures).code is ErrorCode.QUORUM_MISSING
    cosign(server_home, finished)
    other = releasing.create_release(server_home, RUN, tmp_path / "third", evaluation=figures)
    assert other.digest != made.digest
    assert verify_release(tmp_path / "third").findings == ()
    assert verify_release(tmp_path / "first").findings == ()
    assert len(releasing.list_releases(server_home)) == 2


def test_an_archive_holds_the_bundles_files_and_nothing_of_the_server(server_home: ServerHome, finished: Keys, tmp_path: Path) -> None:
    _refused(server_home, tmp_path / "bundle")
    cosign(server_home, finished)
    releasing.create_release(server_home, RUN, tmp_path / "bundle", archive=tmp_path / "bundle.tar")
    with tarfile.open(tmp_path / "bundle.tar") as packed:
        entries = packed.getmembers()
        assert {(entry.mtime, entry.uid, entry.uname, entry.mode) for entry in entries} == {(0, 0, "", 0o644)}
        packed.extractall(tmp_path / "out", filter="data")
    assert verify_release(tmp_path / "out").findings == ()
    secret = server_home.evidence_key.to_pem()
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert b"PRIVATE KEY" not in path.read_bytes()
            assert secret not in path.read_bytes()
            assert str(server_home.root).encode() not in path.read_bytes()


def test_without_retained_updates_a_release_is_made_and_says_so(
    server_home: ServerHome, planned: Keys, tmp_path: Path, server_cli: Any
) -> None:
    finish_run(server_home, RUN, planned, declared=DECLARED, retain=False)
    _refused(server_home, tmp_path / "bundle")
    cosign(server_home, planned)
    done = server_cli("release", "create", RUN, "--out", tmp_path / "bundle", "--home", server_home.root, "--json")
    assert done.status == 0
    assert done.json["updates"].startswith("not retained")
    listed = server_cli("release", "list", "--home", server_home.root, "--json").json
    assert [row["release"] for row in listed] == [done.json["release"]]


def test_a_run_that_is_not_finished_is_not_released(server_home: ServerHome, planned: Keys, tmp_path: Path, server_cli: Any) -> None:
    done = server_cli("release", "create", RUN, "--out", tmp_path / "bundle", "--home", server_home.root, "--json")
    assert (done.status, done.code) == (16, "PF613")
    done = server_cli("release", "create", "none", "--out", tmp_path / "bundle", "--home", server_home.root, "--json")
    assert (done.status, done.code) == (15, "PF510")
    assert releasing.list_releases(server_home) == []


def test_a_changed_record_a_taken_folder_and_a_wrong_evaluation_are_refused_before_the_log_knows(
    server_home: ServerHome, finished: Keys, tmp_path: Path, server_cli: Any
) -> None:
    call = ("release", "create", RUN, "--home", server_home.root, "--json")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    assert server_cli(*call, "--out", tmp_path / "taken").code == "PF904"
    (tmp_path / "figures.json").write_text("[]")
    assert server_cli(*call, "--out", tmp_path / "out", "--evaluation", tmp_path / "figures.json").code == "PF624"
    assert server_cli(*call, "--out", tmp_path / "out", "--evaluation", tmp_path / "none.json").code == "PF904"
    state = server_home.record(RUN) / record.state_path(2)
    kept = state.read_bytes()
    state.unlink()
    state.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert server_cli(*call, "--out", tmp_path / "out").code == "PF601"
    assert releasing.list_releases(server_home) == []
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_would_not_verify_is_never_there(server_home: ServerHome, finished: Keys, tmp_path: Path) -> None:
    _refused(server_home, tmp_path / "bundle")
    cosign(server_home, finished)
    origin, key = origin_of("test"), server_home.evidence_key
    with SqlStore(server_home.database_url) as store:
        taken = LogKeeper(store, key, origin, least_interval_s=0.0).file()
    prepared = prepare(server_home.record(RUN), key, server_home.model_key(), origin=origin)
    with pytest.raises(ProvenanceError) as caught:
        write_bundle(prepared, taken.leaves[:-1], taken.notes, key, tmp_path / "bundle")
    assert caught.value.code is ErrorCode.RECORD_CHANGED
    assert list(tmp_path.glob("*bundle*")) == []
    write_bundle(prepared, taken.leaves, taken.notes, key, tmp_path / "bundle")
    assert verify_release(tmp_path / "bundle").findings == ()


def test_a_release_waits_for_sites_and_names_them(server_home: ServerHome, finished: Keys, tmp_path: Path) -> None:
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        cosign(server_home, finished)

    releasing.create_release(server_home, RUN, tmp_path / "bundle", wait_s=60, tell=tell)
    assert told == ["waiting for co-signatures: 0 of 3; missing: site-a, site-b, site-c"]
    assert verify_release(tmp_path / "bundle").findings == ()


def test_a_log_that_goes_on_does_not_unmake_a_release(
    server_home: ServerHome, finished: Keys, tmp_path: Path, member: Callable[[str], Any]
) -> None:
    """The bundle ends with the last checkpoint that has a quorum, whatever came into the log since."""
    _refused(server_home, tmp_path / "bundle")
    size = cosign(server_home, finished)
    app.add_site(server_home.root, member("site-d").card)
    made = releasing.create_release(server_home, RUN, tmp_path / "bundle")
    assert made.leaves == size
    assert verify_release(tmp_path / "bundle").findings == ()


def test_a_full_disk_leaves_no_archive(server_home: ServerHome, finished: Keys, tmp_path: Path, small_disk: Path, server_cli: Any) -> None:
    _refused(server_home, tmp_path / "bundle")
    cosign(server_home, finished)
    call = ("release", "create", RUN, "--home", server_home.root, "--json", "--out", tmp_path / "bundle", "--archive", small_disk / "b.tar")
    (small_disk / "filler").write_bytes(bytes(900_000))
    assert server_cli(*call).code == "PF901"
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    assert verify_release(tmp_path / "bundle").findings == ()


def test_the_model_key_stays_the_same_and_is_the_owners_alone(server_home: ServerHome) -> None:
    first = server_home.model_key()
    assert server_home.model_key().public_pem == first.public_pem
    assert (server_home.root / "keys" / "model.pem").stat().st_mode & 0o777 == 0o600
    assert release.MODEL_KEY == "model-key.pem"
