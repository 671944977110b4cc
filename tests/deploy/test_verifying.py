"""`pathfed verify` on bundles and records: what it says, with which exit status. What it finds is in tests/common/provenance."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from record_fixtures import ROUNDS, SITES, TAKES_PART, Scene, small_plan, small_preset, write_files
from release_fixtures import ReleaseScene

from pathfed_common import model
from pathfed_common.encoder import weights
from pathfed_common.errors import ErrorCode, HostError, ProvenanceError
from pathfed_common.plan import Plan
from pathfed_common.provenance import record
from pathfed_common.provenance.documents import ServerCard
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.record import MANIFEST
from pathfed_common.provenance.release import MODEL_KEY, RELEASE
from pathfed_common.provenance.verify import Verdict
from pathfed_local.trusting import trusted_keys
from pathfed_local.verifying import Status, find_record, summary
from pathfed_server.rounds.released import released_chunks
from pathfed_server.rounds.replay import replay_states


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A record whose states are the aggregate of its updates."""
    with small_preset():
        yield _aggregated(small_plan(), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The same with a running average, and weights by norm."""
    change = {"server_optimiser": {"ema": 0.75}, "aggregation": {"rule": "norm_weighted"}}
    with small_preset():
        yield _aggregated(Plan.model_validate({**small_plan().model_dump(), **change}), tmp_path_factory.mktemp("run"))


def _aggregated(plan: Plan, work: Path) -> Scene:
    made = Scene(plan)
    generator = torch.Generator().manual_seed(7)
    for index, names in TAKES_PART.items():
        for site in names:
            drawn = {name: torch.randn(shape, generator=generator) for name, shape in model.update_shapes(plan).items()}
            made.updates[index, site] = weights.dump(drawn, {})
    updates = write_files(work / "updates", {f"{index}-{site}": data for (index, site), data in made.updates.items()})
    first, files = work / "first.safetensors", work / "made"
    first.write_bytes(weights.dump(model.initial_state(plan), {}))
    files.mkdir()
    sites = [[site for site in SITES if site in TAKES_PART[index]] for index in range(1, ROUNDS + 1)]
    for found in replay_states(plan, sites, lambda i, site: updates / f"{i}-{site}", first=first, work=files):
        index = found.round_index
        made.states[index] = weights.load(found.state.read_bytes())
        chunks = released_chunks(plan, state=found.state, optimiser=files / f"optimiser-{index}.safetensors")
        made.averages[index] = b"".join(chunks)
        made.factors |= {(index, site): factor for site, factor in found.factors.items()}
    return made


@pytest.fixture(scope="module")
def places(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle/`, `record/`, `updates/` and `trust.json`."""
    folder = tmp_path_factory.mktemp("given")
    write_files(folder / "bundle", ReleaseScene(scene).files(evaluation=b'{"kNN": 0.9}'))
    write_files(folder / "record", scene.files())
    write_files(folder / "updates", {f"round-{index:04d}/{site}.safetensors": data for (index, site), data in scene.updates.items()})
    keys = {"server": scene.server.public.to_text(), "sites": {site: key.public.to_text() for site, key in scene.keys.items()}}
    (folder / "trust.json").write_text(json.dumps(keys))
    return folder


@pytest.fixture
def verify(run_main: Any) -> Any:
    from pathfed_local import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        done = run_main(cli.main, "pathfed", "verify", *arguments)
        return done.status, done.out, done.err

    return run


@pytest.mark.parametrize(
    ("trust", "replay", "status"),
    [
        (True, True, Status.PROVEN),
        (False, True, Status.IDENTITIES_UNPROVEN),
        (True, False, Status.AGGREGATION_UNPROVEN),
        (False, False, Status.BOTH_UNPROVEN),
    ],
)
def test_every_answer_has_its_exit_status_and_its_words(trust: bool, replay: bool, status: Status, places: Path, verify: Any) -> None:
    options = [*(["--trust", places / "trust.json"] if trust else []), *(["--replay", places / "updates"] if replay else [])]
    ended, told, _ = verify(places / "bundle", *options, "--json")
    assert ended == status
    said = json.loads(told)
    assert (said["identities_proven"], said["aggregation_proven"]) == (trust, replay)
    assert any("PF604" in sentence for sentence in said["not_proven"]) is not trust
    assert any("PF623" in sentence for sentence in said["not_proven"]) is not replay
    assert any("bit for bit" in sentence for sentence in said["proven"]) is replay
    ended, told, _ = verify(places / "bundle", *options)
    assert ended == status
    assert "Proven" in told
    assert "Not proven" in told


@pytest.mark.parametrize("what", ["bundle", "record"])
@pytest.mark.parametrize(("trust", "status"), [(True, Status.AGGREGATION_UNPROVEN), (False, Status.BOTH_UNPROVEN)])
def test_a_first_state_that_was_not_drawn_again_is_not_proven(what: str, trust: bool, status: Status, places: Path, verify: Any) -> None:
    options = ["--trust", places / "trust.json"] if trust else []
    ended, told, _ = verify(places / what, *options, "--replay", places / "updates", "--no-redraw", "--json")
    said = json.loads(told)
    assert (ended, said["first_state_proven"]) == (status, False)
    if what == "bundle":
        assert not any("first state" in sentence for sentence in said["proven"])
        assert any("FIRST STATE" in sentence for sentence in said["not_proven"])
    ended, told, _ = verify(places / what, *options, "--replay", places / "updates", "--json")
    assert (ended, json.loads(told)["first_state_proven"]) == (Status.PROVEN if trust else Status.IDENTITIES_UNPROVEN, True)


def test_a_changed_bundle_fails_and_names_the_file(places: Path, tmp_path: Path, verify: Any) -> None:
    files = {path.relative_to(places / "bundle").as_posix(): path.read_bytes() for path in (places / "bundle").rglob("*") if path.is_file()}
    folder = write_files(tmp_path / "bundle", {**files, MODEL_KEY: b"", "extra": b""})
    ended, told, _ = verify(folder, "--json")
    assert ended == ProvenanceError.exit_status
    assert json.loads(told)["error"]["code"] == "PF616"
    _, _, errors = verify(folder)
    assert "extra" in errors
    assert MODEL_KEY in errors


def test_a_replay_finds_a_state_that_is_not_the_aggregate(scene: Scene, places: Path, tmp_path: Path, verify: Any) -> None:
    poisoned = dict(scene.states[2])
    poisoned["encoder.norm.bias"] = poisoned["encoder.norm.bias"] + 1e-3
    crooked = replace(scene, states={**scene.states, 2: poisoned})
    folder = write_files(tmp_path / "bundle", ReleaseScene(crooked).files())
    assert verify(folder)[0] == Status.BOTH_UNPROVEN
    ended, told, _ = verify(folder, "--replay", places / "updates", "--json")
    assert ended == ProvenanceError.exit_status
    error = json.loads(told)["error"]
    assert (error["code"], error["where"]) == ("PF621", record.state_path(2))


def test_a_running_average_is_released_and_a_replay_proves_it(averaged: Scene, tmp_path: Path, verify: Any) -> None:
    folder = write_files(tmp_path / "bundle", ReleaseScene(averaged).files())
    updates = write_files(tmp_path, _places(averaged.updates))
    assert any(factor < 1 for factor in averaged.factors.values())
    ended, told, _ = verify(folder, "--json")
    assert ended == Status.BOTH_UNPROVEN
    assert any("running average" in sentence for sentence in json.loads(told)["proven"])
    assert any("running average" in sentence for sentence in json.loads(told)["not_proven"])
    ended, told, _ = verify(folder, "--replay", updates, "--json")
    assert ended == Status.IDENTITIES_UNPROVEN
    assert any("every state and running average" in sentence for sentence in json.loads(told)["proven"])
    card = (folder / "encoder" / "README.md").read_text()
    assert "a running average, which kept 0.75 of itself" in card
    assert "the round's median" in card


@pytest.mark.parametrize("what", ["average", "factor"])
def test_a_replay_finds_an_average_and_a_factor_that_the_updates_do_not_give(
    what: str, averaged: Scene, tmp_path: Path, verify: Any
) -> None:
    """Signed consistently, such a record verifies without a replay."""
    if what == "average":
        poisoned = weights.load(averaged.averages[ROUNDS])
        poisoned["norm.bias"] = poisoned["norm.bias"] + 1e-3
        crooked = replace(averaged, averages={**averaged.averages, ROUNDS: weights.dump(poisoned, {"format": "pt"})})
    else:
        crooked = replace(averaged, factors={**averaged.factors, (ROUNDS, "a"): 0.25})
    folder = write_files(tmp_path / "bundle", ReleaseScene(crooked).files())
    assert verify(folder)[0] == Status.BOTH_UNPROVEN
    ended, told, _ = verify(folder, "--replay", write_files(tmp_path, _places(averaged.updates)), "--json")
    assert ended == ProvenanceError.exit_status
    error = json.loads(told)["error"]
    assert (error["code"], error["where"]) == ("PF621", record.state_path(ROUNDS))
    assert what in error["value"]


def _places(updates: Mapping[tuple[int, str], bytes]) -> dict[str, bytes]:
    return {f"round-{index:04d}/{site}.safetensors": data for (index, site), data in updates.items()}


def test_a_replay_wants_every_update_as_it_was_signed(scene: Scene, places: Path, tmp_path: Path, verify: Any) -> None:
    some = {f"round-{index:04d}/{site}.safetensors": data for (index, site), data in scene.updates.items()}
    some["round-0001/a.safetensors"] = some["round-0001/b.safetensors"]
    del some["round-0003/c.safetensors"]
    ended, told, errors = verify(places / "bundle", "--replay", write_files(tmp_path / "updates", some), "--json")
    assert ended == ProvenanceError.exit_status
    assert json.loads(told)["error"]["code"] == "PF622"
    assert "round-0003/c.safetensors" in errors
    assert verify(places / "bundle", "--replay", tmp_path / "nothing")[0] == ProvenanceError.exit_status


def test_a_record_is_verified_as_before_and_replayed_too(places: Path, verify: Any) -> None:
    ended, told, _ = verify(places / "record", "--trust", places / "trust.json", "--json")
    assert ended == 0
    assert json.loads(told)["aggregation_proven"] is False
    assert verify(places / "record")[0] == Status.IDENTITIES_UNPROVEN
    ended, told, _ = verify(places / "record", "--replay", places / "updates", "--trust", places / "trust.json", "--json")
    assert ended == 0
    said = json.loads(told)
    assert said["aggregation_proven"] is True
    assert said["notes"] == []


# Archives.


def _packed(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w") as packed:
        packed.add(folder, arcname=".")
    return archive


def test_an_archive_is_verified_like_its_folder(places: Path, tmp_path: Path, verify: Any) -> None:
    assert verify(_packed(places / "bundle", tmp_path / "bundle.tar"))[0] == Status.BOTH_UNPROVEN


def test_an_archive_that_reaches_out_is_refused_before_anything_is_written(places: Path, tmp_path: Path, verify: Any) -> None:
    def entry(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
        made = tarfile.TarInfo(name)
        made.type, made.linkname = kind, "release.dsse"
        return made

    twice = [entry("release.dsse"), entry("./release.dsse")]
    hostile = [[entry("../outside")], [entry("/outside")], [entry("a", tarfile.SYMTYPE)], [entry("a", tarfile.LNKTYPE)], twice]
    for number, entries in enumerate([*hostile, [entry("a", tarfile.FIFOTYPE)]]):
        archive = tmp_path / f"{number}.tar"
        with tarfile.open(archive, "w") as packed:
            for made in entries:
                packed.addfile(made)
        ended, told, _ = verify(archive, "--json")
        assert ended == Status.UNREADABLE
        assert json.loads(told)["error"]["code"] == "PF615"
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("data", [b"", b"not an archive", b"\0" * 2048])
def test_a_file_that_is_no_archive_cannot_be_read(data: bytes, tmp_path: Path, verify: Any) -> None:
    (tmp_path / "bundle.tar").write_bytes(data)
    assert verify(tmp_path / "bundle.tar")[0] == Status.UNREADABLE


# Where it is; whom to trust.


@pytest.mark.parametrize(("place", "name"), [("", MANIFEST), ("record", MANIFEST), ("release", RELEASE), ("", RELEASE)])
def test_record_and_release_are_found_in_a_run_and_in_a_demo(tmp_path: Path, place: str, name: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / name).write_text("")
    assert find_record(tmp_path) == tmp_path / place


@pytest.mark.parametrize("arguments", [("NOTHING",), ("NOTHING", "--json")])
def test_a_folder_without_a_record_cannot_be_read(arguments: tuple[str, ...], verify: Any) -> None:
    ended, told, errors = verify(*arguments)
    assert ended == Status.UNREADABLE
    if "--json" in arguments:
        assert json.loads(told)["error"]["code"] == "PF615"
    else:
        assert "PF615" in errors


def test_trusted_keys_are_read_strictly(tmp_path: Path) -> None:
    assert trusted_keys(None) is None
    file = tmp_path / "trust.json"
    key = SigningKey.generate().public
    file.write_text(json.dumps({"server": key.to_text(), "sites": {"site-a": key.to_text()}}))
    trusted = trusted_keys(file)
    assert trusted is not None
    assert trusted.server == key
    for text in ("[]", "{}", "not json", json.dumps({"server": "ed25519:AA==", "sites": {}})):
        file.write_text(text)
        with pytest.raises(ProvenanceError, match="PF604"):
            trusted_keys(file)
    with pytest.raises(HostError, match="PF904"):
        trusted_keys(tmp_path / "none.json")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(HostError, match="PF904"):
        trusted_keys(file)


def test_cards_and_folders_of_cards_are_trusted(scene: Scene, tmp_path: Path) -> None:
    files = scene.files()
    folder = write_files(tmp_path / "cards", {f"{site}.dsse": files[record.card_path(site)] for site in SITES})
    server = ServerCard(name="lakes", evidence_key=scene.server.public, ca_pem="", fleet_address="h:1", **_addresses())
    (folder / "server.dsse").write_bytes(server.to_bytes(scene.server))
    assert trusted_keys(folder) == scene.trusted
    assert trusted_keys(folder / "server.dsse") == replace(scene.trusted, sites={})
    (folder / "b-again.json").write_text(json.dumps({"sites": {"b": SigningKey.generate().public.to_text()}}))
    with pytest.raises(ProvenanceError, match="two keys"):
        trusted_keys(folder)
    (folder / "b-again.json").unlink()
    (folder / "approval.dsse").write_bytes(files[record.approval_path("a")])
    with pytest.raises(ProvenanceError, match="no card"):
        trusted_keys(folder)
    (folder / "approval.dsse").write_bytes(files[record.card_path("a")].replace(b'"sig":"', b'"sig":"A'))
    with pytest.raises(ProvenanceError) as caught:
        trusted_keys(folder)
    assert caught.value.code in (ErrorCode.IDENTITY_UNPROVEN, ErrorCode.RECORD_SIGNATURE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProvenanceError, match="no trusted key"):
        trusted_keys(tmp_path / "empty")


def _addresses() -> dict[str, str]:
    return {name: "h:1" for name in ServerCard.__dataclass_fields__ if name.endswith("_address") and name != "fleet_address"}


def test_a_summary_is_a_json_value() -> None:
    fields: dict[str, Any] = dict.fromkeys(Verdict.__dataclass_fields__)
    fields.update(sites=(), notes=(), findings=())
    verdict = Verdict(**fields)
    assert json.loads(json.dumps(summary(verdict)))["sites"] == {}
