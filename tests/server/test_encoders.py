"""Importing a published encoder, and plans that start from one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_fixtures import Done
from torch import Tensor

from pathfed_common import digest, model
from pathfed_common.encoder import weights
from pathfed_common.encoder.published import Match, Outcome
from pathfed_common.encoder.spec import EncoderSpec, preset
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.errors import PathfedError
from pathfed_common.ids import RunName
from pathfed_common.plan import Plan, load_plan
from pathfed_server import app
from pathfed_server.db.sql_store import SqlStore
from pathfed_server.encoders import Imported, import_checkpoint, stored_encoder
from pathfed_server.home import ServerHome

_SPEC = EncoderSpec(name="small", img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=3, reg_tokens=1, init_values=0.1)
_PRESET = "vit_tiny_patch16_224"


def _state(spec: EncoderSpec = _SPEC, seed: int = 3) -> dict[str, Tensor]:
    return dict(VisionTransformer(spec, generator=torch.Generator().manual_seed(seed)).state_dict())


def _written(path: Path, state: dict[str, Tensor], **options: Any) -> Path:
    safetensors.torch.save_file(state, path, **options)
    return path


def _refused(call: Callable[..., object], *arguments: Any, **options: Any) -> PathfedError:
    with pytest.raises(PathfedError) as caught:
        call(*arguments, **options)
    return caught.value


def _nothing_stored(home: ServerHome) -> bool:
    return not home.checkpoints.exists() or not list(home.checkpoints.iterdir())


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """As a model hub has it: half precision, a prefix, larger images, a classifier, metadata."""
    larger = {f"model.{name}": tensor.to(torch.float16) for name, tensor in _state(replace(_SPEC, img_size=64)).items()}
    return _written(tmp_path / "model.safetensors", {**larger, "head.weight": torch.zeros(2, 24)}, metadata={"format": "pt", "x": "y"})


def test_a_published_file_becomes_the_encoders_float32_tensors_named_by_their_digest(server_home: ServerHome, published: Path) -> None:
    told: list[Match] = []
    made = import_checkpoint(server_home, published, _SPEC, tell=told.append)
    assert told == [made.match]
    assert made.match.counts == {
        "matched": len(_SPEC.shapes()) - 1,
        "resampled": 1,
        "missing": 0,
        "mis-shaped": 0,
        "extra": 1,
    }
    assert made.path == server_home.root / "checkpoints" / f"{made.digest.removeprefix('sha256:')}.safetensors"
    assert [path.name for path in server_home.checkpoints.iterdir()] == [made.path.name]
    data = made.path.read_bytes()
    assert digest.of_bytes(data) == made.digest
    tensors = weights.load(data)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == _SPEC.shapes()
    original = _state(replace(_SPEC, img_size=64))
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        if name != "pos_embed":
            assert torch.equal(tensor, original[name].to(torch.float16).float())


def test_the_order_of_a_files_header_and_its_metadata_do_not_matter(server_home: ServerHome, tmp_path: Path) -> None:
    state = _state()
    first = import_checkpoint(server_home, _written(tmp_path / "a.safetensors", state), _SPEC)
    backwards = {f"backbone.{name}": tensor for name, tensor in reversed(state.items())}
    again = import_checkpoint(server_home, _written(tmp_path / "b.safetensors", backwards, metadata={"k": "v"}), _SPEC)
    assert again.digest == first.digest
    # What a release holds is in this form already: its own digest is the one that plans name.
    (tmp_path / "release.safetensors").write_bytes(weights.dump(state, {"format": "pt"}))
    released = import_checkpoint(server_home, tmp_path / "release.safetensors", _SPEC)
    assert released.digest == first.digest == digest.of_bytes((tmp_path / "release.safetensors").read_bytes())


def test_a_checkpoint_with_missing_or_misshaped_parameters_is_refused_with_the_report(server_home: ServerHome, tmp_path: Path) -> None:
    state = _state()
    del state["norm.bias"]
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(96, 23)
    told: list[Match] = []
    error = _refused(import_checkpoint, server_home, _written(tmp_path / "x.safetensors", state), _SPEC, tell=told.append)
    assert error.code == "PF108"
    assert "1 parameters are missing and 1 mis-shaped" in error.what
    assert error.value is not None
    assert "norm.bias missing: wanted 24, found none" in error.value
    assert "blocks.1.mlp.fc1.weight mis-shaped: wanted 96 x 24, found F32 96 x 23" in error.value
    assert [finding.name for finding in told[0].of(Outcome.MISSING)] == ["norm.bias"]
    assert _nothing_stored(server_home)


def test_another_encoder_is_refused_in_a_readable_length(server_home: ServerHome, tmp_path: Path) -> None:
    other = _written(tmp_path / "x.safetensors", _state(replace(_SPEC, embed_dim=48)))
    error = _refused(import_checkpoint, server_home, other, _SPEC)
    assert error.code == "PF108"
    assert error.value is not None
    assert "and " in error.value
    assert len(error.value) < 1500


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_left(server_home: ServerHome, tmp_path: Path, value: float) -> None:
    state = _state()
    state["norm.weight"][5] = value  # among the last to be written
    error = _refused(import_checkpoint, server_home, _written(tmp_path / "x.safetensors", state), _SPEC)
    assert (error.code, "norm.weight" in error.what) == ("PF108", True)
    assert _nothing_stored(server_home)


def test_two_copies_of_the_encoder_are_chosen_between_by_prefix(server_home: ServerHome, tmp_path: Path) -> None:
    student, teacher = _state(seed=1), _state(seed=2)
    both = {f"encoder.{name}": tensor for name, tensor in student.items()} | {f"module.{name}": tensor for name, tensor in teacher.items()}
    file = _written(tmp_path / "x.safetensors", both)
    error = _refused(import_checkpoint, server_home, file, _SPEC)
    assert (error.code, "--prefix" in str(error.remedy)) == ("PF108", True)
    made = import_checkpoint(server_home, file, _SPEC, prefix="module.")
    assert torch.equal(weights.load(made.path.read_bytes())["cls_token"], teacher["cls_token"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "renamed.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_unopened(server_home: ServerHome, tmp_path: Path, name: str, zipped: bool) -> None:
    marker = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return Path.touch, (marker,)

    file = tmp_path / name
    torch.save({"x": Trap()}, file, _use_new_zipfile_serialization=zipped)
    error = _refused(import_checkpoint, server_home, file, _SPEC)
    assert error.code == "PF107"
    assert "run any code" in error.what
    assert not marker.exists()
    assert _nothing_stored(server_home)


def test_header_whose_length_starts_like_a_pickle_is_none(server_home: ServerHome, tmp_path: Path) -> None:
    # The length's lowest byte is 80 for one length in 32 (of multiples of 8).
    for padding in range(400):
        file = _written(tmp_path / "x.safetensors", _state(), metadata={"k": "v" * padding})
        if file.read_bytes()[0] == 0x80:
            import_checkpoint(server_home, file, _SPEC)
            return
    pytest.fail("no such header was made")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 100, (2**40).to_bytes(8, "little") + b"{}"])
def test_damaged_files_are_refused(server_home: ServerHome, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    assert _refused(import_checkpoint, server_home, tmp_path / "x.safetensors", _SPEC).code == "PF107"
    cut = _written(tmp_path / "y.safetensors", _state())
    cut.write_bytes(cut.read_bytes()[:-1])
    assert _refused(import_checkpoint, server_home, cut, _SPEC).code == "PF107"
    assert _refused(import_checkpoint, server_home, tmp_path / "absent.safetensors", _SPEC).code == "PF904"
    assert _nothing_stored(server_home)


# ---- plans ----


@pytest.fixture(scope="module")
def tiny_state() -> dict[str, Tensor]:
    return _state(preset(_PRESET, img_size=32), seed=9)


@pytest.fixture
def imported(server_home: ServerHome, tiny_state: dict[str, Tensor], tmp_path: Path) -> Imported:
    file = _written(tmp_path / "tiny.safetensors", tiny_state)
    return import_checkpoint(server_home, file, preset(_PRESET, img_size=32))


def _starting_from(plan_file: Path, named: str, **cohort: int) -> Path:
    text = plan_file.read_text().replace("[privacy]", f'[encoder]\ninit_from = "{named}"\n[privacy]', 1)
    for key, value in cohort.items():
        text = text.replace(f"{key} = 32", f"{key} = {value}")
    other = plan_file.with_name("starting.toml")
    other.write_text(text)
    return other


def _plan(file: Path) -> Plan:
    return load_plan(file.read_text(), where=file)


def test_the_first_state_has_the_imported_encoder_and_the_seeds_head(
    server_home: ServerHome, imported: Imported, plan_file: Path, tiny_state: dict[str, Tensor]
) -> None:
    plan = _plan(_starting_from(plan_file, imported.digest))
    state = model.initial_state(plan, stored_encoder(server_home, plan))
    random = model.initial_state(_plan(plan_file), stored_encoder(server_home, _plan(plan_file)))
    assert list(state) == list(random)
    for name, tensor in state.items():
        inner = name.removeprefix(model.ENCODER_PREFIX)
        assert torch.equal(tensor, tiny_state[inner] if inner != name else random[name])
    assert not torch.equal(random["encoder.cls_token"], tiny_state["cls_token"])


def test_a_plan_publishes_and_runs_only_with_its_checkpoint_whole(
    server_home: ServerHome, imported: Imported, plan_file: Path, member: Callable[[str], Any], tmp_path: Path
) -> None:
    file = _starting_from(plan_file, imported.digest)
    plan = app.publish_plan(server_home.root, file, tmp_path / "out.dsse")
    assert app.describe_plan(plan, None)["starts_from"] == imported.digest
    for name in ("site-a", "site-b"):
        app.add_site(server_home.root, member(name).card)
    names = [row.name for row in _sites(server_home)]
    data = imported.path.read_bytes()
    imported.path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    error = _refused(app.start_run, server_home.root, plan.digest, RunName("r"), names)
    assert (error.code, "changed on the disk" in error.what) == ("PF109", True)
    assert _refused(stored_encoder, server_home, plan).code == "PF109"
    imported.path.unlink()
    error = _refused(app.start_run, server_home.root, plan.digest, RunName("r"), names)
    assert (error.code, error.value) == ("PF109", imported.digest)
    imported.path.write_bytes(data)
    assert app.start_run(server_home.root, plan.digest, RunName("r"), names).name == "r"


def _sites(home: ServerHome) -> list[Any]:
    with SqlStore(home.database_url) as store:
        return list(store.sites())


def test_a_plan_for_an_unknown_checkpoint_or_other_tiles_is_not_published(
    server_home: ServerHome, imported: Imported, plan_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.dsse"
    error = _refused(app.publish_plan, server_home.root, _starting_from(plan_file, "sha256:" + "0" * 64), out)
    assert (error.code, "does not have" in error.what) == ("PF109", True)
    error = _refused(app.publish_plan, server_home.root, _starting_from(plan_file, imported.digest, tile_px=64), out)
    assert (error.code, "pos_embed differ" in error.what) == ("PF109", True)
    assert "--tile-px 64" in str(error.remedy)
    assert not out.exists()
    with SqlStore(server_home.database_url) as store:
        assert store.plans() == []


def test_a_file_put_there_by_hand_is_no_import(server_home: ServerHome, plan_file: Path, tiny_state: dict[str, Tensor]) -> None:
    data = safetensors.torch.save(dict(reversed(tiny_state.items())), metadata={"z": "1"})
    named = digest.of_bytes(data)
    server_home.checkpoints.mkdir()
    server_home.checkpoint(named).write_bytes(data)
    error = _refused(stored_encoder, server_home, _plan(_starting_from(plan_file, named)))
    assert (error.code, "as an import leaves it" in error.what) == ("PF109", True)


# ---- the command ----


def test_the_command_prints_the_report_and_the_digest(
    server_cli: Callable[..., Done], server_home: ServerHome, tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    larger = _written(tmp_path / "x.safetensors", {**_state(preset(_PRESET, img_size=64)), "head.weight": torch.zeros(2, 192)})
    command = ("encoder", "import", larger, "--preset", _PRESET, "--tile-px", 32, "--home", server_home.root)
    done = server_cli(*command, "--json")
    assert done.status == 0
    assert server_home.checkpoint(digest.parse(done.json["init_from"])).is_file()
    assert (done.json["resampled"], done.json["extra"]) == (1, 1)
    row = next(row for row in done.json["tensors"] if row["outcome"] == "resampled")
    assert row == {"name": "pos_embed", "outcome": "resampled", "wanted": [1, 5, 192], "found": [1, 17, 192], "dtype": "F32"}
    told = server_cli(*command)
    assert told.status == 0
    for words in ("blocks.0-11.attn.qkv.weight", "resampled", "1 x 17 x 192", "head.weight", "extra", done.json["init_from"]):
        assert words in told.out


def test_the_command_reports_before_it_refuses(server_cli: Callable[..., Done], server_home: ServerHome, tmp_path: Path) -> None:
    file = _written(tmp_path / "x.safetensors", {"head.weight": torch.zeros(2, 192)})
    command = ("encoder", "import", file, "--preset", _PRESET, "--home", server_home.root)
    done = server_cli(*command, "--json")
    assert (done.code, done.status) == ("PF108", 11)
    told = server_cli(*command)
    assert told.status == 11
    assert "missing" in told.out


@pytest.mark.parametrize("options", [("--preset", "vit_nano"), ("--preset", _PRESET, "--tile-px", 100)])
def test_what_cannot_be_an_encoder_is_told(server_cli: Callable[..., Done], server_home: ServerHome, options: tuple[Any, ...]) -> None:
    done = server_cli("encoder", "import", "x.safetensors", *options, "--home", server_home.root, "--json")
    assert done.code == "PF905"
