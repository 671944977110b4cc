"""Base states and updates between a site and the real server, over real mutual TLS: whatever breaks, the right bytes or none."""

import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bulk_world import LATER, Run, breaking_line, bulk_of, random_file, sent
from real_control import RealServer, Site, serving_in

from pathfed_client.bulk import SiteBulk
from pathfed_client.egress.entry import EgressKind
from pathfed_client.egress.outlet import Outlet
from pathfed_common import digest, part_file, shards
from pathfed_common.errors import ErrorCode, HostError, PathfedError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.part_file import manifest_of
from pathfed_server import members
from pathfed_server.bulk import BulkFiles
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.rounds import uploads
from pathfed_server.transport import bulk_service

SHARD, PIECE = 64 * 1024, 8 * 1024
STATE = os.urandom(5 * SHARD + 1000)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards, so that a file of many is small: both ends live in this process."""
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD)
    monkeypatch.setattr(shards, "PIECE_BYTES", PIECE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with serving_in(tmp_path_factory.mktemp("real") / "server") as running:
        yield running


@pytest.fixture(scope="module")
def site(server: RealServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = server.enrolled(tmp_path_factory.mktemp("site") / "north", "north")
    yield made
    made.close()


@pytest.fixture
def begin(server: RealServer, site: Site, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Run]:
    numbers = iter(range(100))
    shutil.rmtree(site.home.base_states, ignore_errors=True)

    def make(state: bytes = STATE, sites: tuple[str, ...] = ("north",), **options: Any) -> Run:
        name = f"{digest.short(digest.of_bytes(request.node.name.encode()))}-{next(numbers)}"
        plan = server.publish(tmp_path, f"p{name}")
        return Run.begin(server, f"r{name}", plan, list(sites), state, **options)

    return make


def refused(code: ErrorCode, work: Callable[[], object]) -> PathfedError:
    with pytest.raises(PathfedError) as caught:
        work()
    assert caught.value.code is code, caught.value
    return caught.value


# ---- down ----


def test_a_base_state_arrives_and_is_not_fetched_again(begin, site):
    run = begin()
    bulk = bulk_of(site)
    path = bulk.fetch(run.offer("north"))
    assert path.read_bytes() == STATE
    before = len(sent(site, EgressKind.QUERY))
    assert bulk.fetch(run.offer("north")) == path
    assert len(sent(site, EgressKind.QUERY)) == before, "nothing was asked"


def test_a_line_that_breaks_in_every_shard_costs_what_was_on_the_way(begin, site):
    run = begin(os.urandom(6 * SHARD))
    with breaking_line(site.home.server_card.control_address, [9_000, *[40_000] * 12]) as line:
        assert bulk_of(site, tunnel=line.port).fetch(run.offer("north")).read_bytes() == run.state
    assert line.opened > 6
    handshakes = 9_000 * line.opened
    assert len(run.state) < line.carried["down"] < 2 * len(run.state) + handshakes


def test_a_stream_that_the_server_ends_before_its_deadline_is_followed_by_another_and_nothing_was_cut(begin, site, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pathfed_client.bulk")
    monkeypatch.setattr(bulk_service, "_SENDING_S", 0.0)
    run = begin()
    before = len(sent(site, EgressKind.QUERY))
    assert bulk_of(site).fetch(run.offer("north")).read_bytes() == STATE
    assert len(sent(site, EgressKind.QUERY)) - before > len(STATE) / PIECE, "one question for each piece"
    assert not [line for line in caplog.messages if "cut" in line]


def test_streams_that_a_server_ends_again_and_again_take_no_longer_than_the_round(begin, site, monkeypatch):
    monkeypatch.setattr(bulk_service, "_SENDING_S", 0.0)
    clock = itertools.count()
    bulk = bulk_of(site, now=lambda: float(next(clock)))
    refused(ErrorCode.TRANSFER_UNFINISHED, lambda: bulk.fetch(begin().offer("north", deadline=3.0)))


def test_unchanged_shards_of_an_earlier_state_do_not_travel_again(begin, site):
    first = begin()
    bulk_of(site).fetch(first.offer("north"))
    changed = bytearray(STATE)
    changed[SHARD + 5] ^= 1
    second = begin(bytes(changed))
    with breaking_line(site.home.server_card.control_address, []) as line:
        assert bulk_of(site, tunnel=line.port).fetch(second.offer("north")).read_bytes() == second.state
    assert line.carried["down"] < 2 * SHARD, "one shard of six"


def test_what_a_disk_has_changed_in_the_cache_is_fetched_again_and_only_that(begin, site):
    run = begin()
    path = bulk_of(site).fetch(run.offer("north"))
    data = bytearray(path.read_bytes())
    data[2 * SHARD] ^= 1
    path.write_bytes(data)
    with breaking_line(site.home.server_card.control_address, []) as line:
        assert bulk_of(site, tunnel=line.port).fetch(run.offer("north")).read_bytes() == run.state
    assert SHARD < line.carried["down"] < 2 * SHARD


def test_a_fetch_that_was_killed_goes_on_from_where_it_was(begin, site):
    run = begin(os.urandom(6 * SHARD))

    class KilledError(BaseException):
        pass

    def killed(seconds: float) -> None:
        raise KilledError

    with breaking_line(site.home.server_card.control_address, [2**40, 3 * SHARD]) as line:
        with pytest.raises(KilledError):
            bulk_of(site, tunnel=line.port, sleep=killed).fetch(run.offer("north"))
        line.carried["down"] = 0
        assert bulk_of(site, tunnel=line.port).fetch(run.offer("north")).read_bytes() == run.state
        assert line.carried["down"] < 5 * SHARD


def test_a_file_that_the_server_changed_is_never_used(begin, site, server):
    run = begin(os.urandom(3 * SHARD))
    path = run.files.state(0)
    assert bulk_of(site).fetch(run.offer("north")).read_bytes() == run.state, "the server knows its manifest now"
    shutil.rmtree(site.home.base_states)
    data = bytearray(path.read_bytes())
    data[SHARD + 1] ^= 1
    path.write_bytes(data)
    refused(ErrorCode.SHARD_DAMAGED, lambda: bulk_of(site).fetch(run.offer("north")))
    assert not [kept for kept in site.home.base_states.iterdir() if kept.suffix == ".safetensors"]


def test_a_manifest_that_lies_costs_a_transfer_and_leaves_nothing(begin, site, server, monkeypatch):
    """Shards that fit the list, and a list that is not the named file's."""
    run = begin(os.urandom(2 * SHARD))
    other = random_file(run.files.state(0).with_name("other"), 2 * SHARD)
    lie = replace(manifest_of(other), file=run.digest)
    monkeypatch.setattr(BulkFiles, "manifest", lambda self, asking, file: lie)
    monkeypatch.setattr(BulkFiles, "_state", lambda self, asking, file: other)
    refused(ErrorCode.BASE_STATE_MISMATCH, lambda: bulk_of(site).fetch(run.offer("north")))
    assert not list(site.home.base_states.glob(f"{run.digest.removeprefix('sha256:')}*"))
    refused(ErrorCode.BASE_STATE_MISMATCH, lambda: bulk_of(site).fetch(run.offer("north", base_state_bytes=5)))


def test_a_state_of_a_run_that_a_site_has_no_part_in_is_not_there_for_it(begin, server, site, tmp_path):
    stranger = server.enrolled(tmp_path / "stranger", "stranger")
    run = begin(os.urandom(SHARD))
    refused(ErrorCode.FILE_NOT_OFFERED, lambda: bulk_of(stranger).fetch(run.offer("stranger")))
    refused(ErrorCode.FILE_NOT_OFFERED, lambda: bulk_of(site).fetch(run.offer("north", base_state=digest.of_bytes(b"none"))))
    stranger.close()
    server.revoke_if_enrolled(SiteName("stranger"))


def test_earlier_states_are_swept_and_make_room(begin, site, monkeypatch):
    runs = [begin(os.urandom(SHARD)) for _ in range(3)]
    text = (site.home.root / "policy.toml").read_text()
    (site.home.root / "policy.toml").write_text(text.replace("base_state_cache_gb = 20.0", f"base_state_cache_gb = {1.5 * SHARD / 1e9}"))
    try:
        for run in runs:
            bulk_of(site).fetch(run.offer("north"))
            os.utime(site.home.base_states / f"{run.digest[7:]}.safetensors", (time.time() - 100 + runs.index(run),) * 2)
    finally:
        (site.home.root / "policy.toml").write_text(text)
    kept = {path.stem for path in site.home.base_states.glob("*.safetensors")}
    assert kept == {run.digest[7:] for run in runs[1:]}


# ---- up ----


def deliver(run: Run, site: Site, path: Path, deadline: float = LATER, **options: Any) -> None:
    bulk_of(site, **options).deliver(path, manifest_of(path), run.offer(str(site.home.name), deadline))


def test_an_update_arrives_whole_and_again_it_is_there(begin, site, tmp_path):
    run, path = begin(), random_file(tmp_path / "update", 3 * SHARD + 7)
    deliver(run, site, path)
    assert uploads.arrived(run.incoming, SiteName("north")).read_bytes() == path.read_bytes()
    assert not list(run.incoming.glob("*.part"))
    before = len(sent(site, EgressKind.UPDATE_AGAIN))
    deliver(run, site, path)
    assert len(sent(site, EgressKind.UPDATE_AGAIN)) == before
    announced = sent(site, EgressKind.UPDATE_MANIFEST)
    assert len(announced) >= 2


def test_what_is_sent_again_after_a_cut_is_written_down_before(begin, site, tmp_path):
    run, path = begin(), random_file(tmp_path / "update", 5 * SHARD)
    with breaking_line(site.home.server_card.control_address, [9_000, *[50_000] * 10]) as line:
        deliver(run, site, path, tunnel=line.port)
    assert uploads.arrived(run.incoming, SiteName("north")).read_bytes() == path.read_bytes()
    again = [one for one in sent(site, EgressKind.UPDATE_AGAIN) if one.run == run.name]
    assert again, "cuts in the middle of shards"
    listed = path.stat().st_size + sum(one.size for one in again)
    # What the line carried up beside pieces: a handshake and a few calls for each connection.
    assert line.carried["up"] < listed + 12_000 * line.opened
    assert max(one.size for one in again) <= SHARD, "a cut costs what was on the way"


def test_an_upload_outlives_the_end_of_the_control_process_and_of_the_site(begin, server, site, tmp_path):
    run, path = begin(), random_file(tmp_path / "update", 4 * SHARD)
    # A second control plane on the same home, as after a restart: nothing of the first is in its memory.
    with breaking_line(site.home.server_card.control_address, [9_000 + 2 * SHARD, 0, 0, 0]) as line:
        refused(ErrorCode.TRANSFER_UNFINISHED, lambda: deliver(run, site, path, deadline=2.1, tunnel=line.port))
    part = run.incoming / "north.part"
    assert 0 < part.stat().st_size < path.stat().st_size
    here = part.stat().st_size
    with SqlStore(server.home.database_url) as store:
        again = BulkFiles(server.home, store)
        assert again.begin(SiteName("north"), run.name, 1, manifest_of(path)) == here
        again.close()
    with breaking_line(site.home.server_card.control_address, []) as line:
        deliver(run, site, path, tunnel=line.port)
        assert line.carried["up"] < path.stat().st_size - here + 12_000
    assert uploads.arrived(run.incoming, SiteName("north")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("why", ["not asked", "decided", "another run", "another round"])
def test_an_update_that_nobody_asked_for_is_not_taken(begin, server, site, tmp_path, why):
    run, path = begin(), random_file(tmp_path / "update", SHARD)
    offer = run.offer("north")
    if why == "not asked":
        run = begin(sites=())
        offer = run.offer("north")
    elif why == "decided":
        run.decided("north")
    elif why == "another run":
        offer = run.offer("north", run="no-such-run")
    else:
        offer = run.offer("north", round_index=2)
    refused(ErrorCode.UPDATE_UNWANTED, lambda: bulk_of(site).deliver(path, manifest_of(path), offer))
    assert not list(run.incoming.glob("north*"))


def test_a_second_update_of_a_round_replaces_a_part_and_never_a_whole_one(begin, site, tmp_path):
    run = begin()
    first, second = random_file(tmp_path / "first", 3 * SHARD), random_file(tmp_path / "second", 2 * SHARD)
    with breaking_line(site.home.server_card.control_address, [9_000 + SHARD, 0, 0, 0]) as line:
        refused(ErrorCode.TRANSFER_UNFINISHED, lambda: deliver(run, site, first, deadline=2.1, tunnel=line.port))
    deliver(run, site, second)
    refused(ErrorCode.UPDATE_UNWANTED, lambda: deliver(run, site, first))
    assert uploads.arrived(run.incoming, SiteName("north")).read_bytes() == second.read_bytes()


def test_an_update_larger_than_the_plans_is_not_taken(begin, site, tmp_path):
    run, path = begin(most_bytes=SHARD), random_file(tmp_path / "update", SHARD + 1)
    refused(ErrorCode.UPDATE_TOO_LARGE, lambda: deliver(run, site, path))
    assert not list(run.incoming.glob("north*"))


def test_a_site_that_is_revoked_moves_nothing_more(begin, server, tmp_path):
    gone = server.enrolled(tmp_path / "gone", "gone")
    run, path = begin(os.urandom(2 * SHARD), sites=("gone",)), random_file(tmp_path / "update", SHARD)
    members.revoke(server.home.root, SiteName("gone"))
    refused(ErrorCode.IDENTITY_REFUSED, lambda: bulk_of(gone).fetch(run.offer("gone")))
    refused(ErrorCode.IDENTITY_REFUSED, lambda: deliver(run, gone, path))
    assert not list(run.incoming.glob("gone*"))
    gone.close()


def test_a_full_disk_at_the_server_is_waited_for(begin, site, tmp_path, monkeypatch):
    run, path = begin(), random_file(tmp_path / "update", 3 * SHARD)
    written, full = part_file._write, [True]

    def write(file: int, data: bytes, place: int) -> None:
        if place >= SHARD and full[0]:
            raise OSError(28, "No space left on device")
        written(file, data, place)

    monkeypatch.setattr(part_file, "_write", write)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        assert (run.incoming / "north.part").stat().st_size == SHARD, "nothing half-written"
        full[0] = len(waited) < 3

    deliver(run, site, path, sleep=sleep)
    assert len(waited) == 3
    assert uploads.arrived(run.incoming, SiteName("north")).read_bytes() == path.read_bytes()


def test_a_full_disk_at_the_site_ends_the_fetch_once_earlier_states_are_gone(begin, site, monkeypatch):
    earlier, run = begin(os.urandom(SHARD)), begin(os.urandom(3 * SHARD))
    bulk_of(site).fetch(earlier.offer("north"))

    def write(file: int, data: bytes, place: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(part_file, "_write", write)
    error = refused(ErrorCode.DISK_FULL, lambda: bulk_of(site).fetch(run.offer("north")))
    assert isinstance(error, HostError)
    assert not list(site.home.base_states.glob("*.safetensors"))


def test_a_server_that_is_away_is_tried_until_the_deadline_and_pauses_grow(begin, site, tmp_path):
    run, path = begin(), random_file(tmp_path / "update", SHARD)
    clock, waited = [2.0], []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        clock[0] += seconds

    with breaking_line(site.home.server_card.control_address, [0] * 100) as line:
        work = lambda: deliver(run, site, path, deadline=32.0, tunnel=line.port, now=lambda: clock[0], sleep=sleep)  # noqa: E731
        refused(ErrorCode.TRANSFER_UNFINISHED, work)
    assert 4 <= len(waited) <= 12
    assert max(waited) > 4 * waited[0]
    assert clock[0] <= 32.0


def test_a_home_without_a_certificate_moves_nothing(begin, site, server, tmp_path):
    run = begin()
    bare = server.new_home(tmp_path / "bare", "bare")
    refused(ErrorCode.NOT_ENROLLED, lambda: SiteBulk(bare, Outlet(site.record)).fetch(run.offer("bare")))


def test_an_error_of_this_sites_own_disk_is_not_the_servers(begin, site, tmp_path):
    run = begin()
    with pytest.raises((TransportError, OSError)):
        deliver(run, site, tmp_path / "gone")
