"""`pathfed demo`, as a person runs it: on painted slides, then everything a newcomer would look at."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from browser_fixtures import chromium
from planted import found_in, mark, planted_words

from pathfed_common.encoder import weights
from pathfed_common.encoder.spec import preset
from pathfed_common.encoder.vit import VisionTransformer
from pathfed_common.model import noise_norm, update_shapes
from pathfed_common.plan import load_plan
from pathfed_common.wire_format import file_bytes, open_update

BIN = Path(sys.executable).parent
ROUNDS, SITES = 2, 3
#: A demo, and the fixture's, at a tenth of the usual speed.
pytestmark = pytest.mark.timeout(1300)


def _run(*arguments: object, within_s: float = 600) -> subprocess.CompletedProcess[str]:
    command, *rest = (str(argument) for argument in arguments)
    return subprocess.run([str(BIN / command), *rest], capture_output=True, text=True, timeout=within_s)


def _demo(out: Path, plan: Path, slides: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return _run("pathfed", "demo", "--out", out, "--plan", plan, "--slides", slides, *more)


#: Beside the plan of the other tests, in which the whole encoder is trained and travels in float32.
ADAPTERS_IN_INT8 = """
[encoder.adapters]
rank = 2
[wire]
dtype = "int8"
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory, plan_file, hospitals):
    """Adapters alone are trained, beside an encoder that keeps its random weights, and travel as int8."""
    folder = tmp_path_factory.mktemp("demo")
    out, plan = folder / "out", folder / "adapters.toml"
    plan.write_text(plan_file.read_text() + ADAPTERS_IN_INT8)
    done = _demo(out, plan, hospitals)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_it_ends_by_itself_and_leaves_no_process(demo, processes_of, wait_for) -> None:
    out, _ = demo
    assert not wait_for(lambda: processes_of(out), until=lambda found: not found, within_s=60)


def test_everything_it_says_is_there_is_there(demo) -> None:
    out, printed = demo
    for place in (
        "release/encoder/model.safetensors",
        "record/manifest.dsse",
        "report.html",
        "server/pathfed.db",
        "logs",
        "commands.log",
        "trust.json",
    ):
        assert (out / place).exists(), place
    assert "pathfed verify" in printed


def test_its_report_shows_the_participants_their_memory_and_painted_tiles_in_a_browser(demo) -> None:
    out, _ = demo
    with chromium() as browser:
        page = browser.new_page()
        page.goto((out / "report.html").as_uri())
        sites = [path.name for path in sorted((out / "sites").iterdir())]
        assert page.locator("table.sites tbody th").all_inner_texts() == sites
        assert page.locator("section[aria-labelledby=memory] tbody th").all_inner_texts() == ["server", *sites]
        assert page.locator("section[aria-labelledby=memory] .bad").count() == 0
        widths = page.locator("section[aria-labelledby=tiles] img").evaluate_all("images => images.map(image => image.naturalWidth)")
        assert len(widths) == 12
        assert set(widths) == {96}
        assert "verified" in (page.locator("section.verdict").get_attribute("class") or "")
        assert page.locator("figure.panel").filter(has_text="time slot").count() == 1


def test_the_record_verifies_with_trusted_keys_and_says_so_without(demo) -> None:
    out, _ = demo
    proven = _run("pathfed", "verify", out / "record", "--trust", out / "trust.json", "--json")
    assert (proven.returncode, json.loads(proven.stdout)["identities_proven"]) == (0, True)
    unproven = _run("pathfed", "verify", out / "record", "--json")
    assert (unproven.returncode, json.loads(unproven.stdout)["identities_proven"]) == (3, False)


@pytest.mark.parametrize(("trusted", "replayed", "status"), [(True, True, 0), (False, True, 3), (True, False, 4), (False, False, 5)])
def test_the_release_says_what_is_proven_and_what_is_not(demo, trusted: bool, replayed: bool, status: int) -> None:
    out, _ = demo
    trust = ["--trust", out / "trust.json"] if trusted else []
    replay = ["--replay", out / "record" / "updates"] if replayed else []
    done = _run("pathfed", "verify", out / "release", *trust, *replay, "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["identities_proven"], said["aggregation_proven"]) == (status, trusted, replayed)
    sites = [path.name for path in sorted((out / "sites").iterdir())]
    assert said["enrolled"] == sites
    assert len(said["cosigned"]) > len(sites) / 2


def test_every_site_was_enrolled_by_an_invitation_that_stands_nowhere(demo) -> None:
    out, _ = demo
    enrolled = json.loads(_run("pathfed-server", "sites", "list", "--home", out / "server", "--json").stdout)
    assert all(site["certificate_until_at"] for site in enrolled)
    commands = (out / "commands.log").read_text()
    assert commands.count("pathfed-site enroll - ") == 2 * SITES
    for file in (path for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        assert b"pathfed1." not in file.read_bytes(), file


def test_a_site_can_list_every_byte_that_left(demo) -> None:
    out, _ = demo
    for site in sorted((out / "sites").iterdir()):
        done = _run("pathfed-site", "egress", "--home", site, "--verify", "--json")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "pattern",
    ["statements/*/*.dsse", "states/*.safetensors", "rounds/*.dsse", "approvals/*.dsse", "encoder/*", "manifest.dsse", "plan.json"],
)
def test_a_changed_byte_anywhere_in_the_record_is_found(demo, tmp_path, pattern: str) -> None:
    out, _ = demo
    record = tmp_path / "record"
    shutil.copytree(out / "record", record)
    for file in sorted(record.glob(pattern))[:2]:
        data = bytearray(file.read_bytes())
        middle = len(data) // 2
        data[middle] ^= 1
        file.write_bytes(data)
        found = _run("pathfed", "verify", record, "--json")
        assert found.returncode == 16, file
        data[middle] ^= 1
        file.write_bytes(data)
    assert _run("pathfed", "verify", record).returncode == 3


def test_the_encoder_loads_under_timms_names_and_has_moved(demo) -> None:
    out, _ = demo
    tensors = weights.load((out / "record" / "encoder" / "model.safetensors").read_bytes())
    config = json.loads((out / "record" / "encoder" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    VisionTransformer(preset("vit_tiny_patch16_224", img_size=96)).load_state_dict(tensors)
    first = weights.load((out / "record" / "states" / "round-0000.safetensors").read_bytes())
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    moved = {name for name in tensors if not torch.equal(tensors[name], first[f"encoder.{name}"])}
    adapted = {f"{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert moved == {f"blocks.{index}.{part}" for index in range(12) for part in adapted}, "where adapters are merged, and nowhere else"


def test_nothing_but_adapters_and_head_travelled_in_the_stated_size(demo) -> None:
    out, _ = demo
    plan = load_plan((out / "plan.toml").read_text(), where="plan.toml")
    shapes = update_shapes(plan)
    sent = sorted((out / "record" / "updates").glob("*/*.safetensors"))
    assert len(sent) == ROUNDS * SITES
    for file in sent:
        assert file.stat().st_size == file_bytes(shapes, "int8") < 500_000
        opened = open_update(file)
        assert opened.shapes == shapes
        assert all(name.startswith("head.") or ".lora_" in name for name in shapes)
        assert 0.005 < opened.rounding() / noise_norm(plan) < 0.02, "a hundredth of the noise"
    first, last = (weights.load((out / "record" / "states" / f"round-{index:04d}.safetensors").read_bytes()) for index in (0, ROUNDS))
    assert {name for name in first if not torch.equal(first[name], last[name])} == shapes.keys()
    rows = json.loads(_run("pathfed-server", "rounds", "demo", "--home", out / "server", "--json").stdout)
    assert all(0.005 < row["wire_rounding"] < 0.02 for row in rows)
    assert "updates travelled as int8" in (out / "release" / "encoder" / "README.md").read_text()


def test_rounds_and_participants_are_in_the_database(demo) -> None:
    out, _ = demo
    rows = json.loads(_run("pathfed-server", "rounds", "demo", "--home", out / "server", "--json").stdout)
    assert [row["state"] for row in rows] == ["committed"] * ROUNDS
    assert all(len(row["sites"]) == SITES for row in rows)
    run = json.loads(_run("pathfed-server", "run", "status", "demo", "--home", out / "server", "--json").stdout)
    assert run["state"] == "finished"


def test_every_ledger_verifies_and_its_epsilon_is_what_three_accountants_allow(demo) -> None:
    out, _ = demo
    for site in sorted((out / "sites").iterdir()):
        found = json.loads(_run("pathfed-site", "ledger", "show", "--home", site, "--json").stdout)
        verified = json.loads(_run("pathfed-site", "ledger", "verify", "--home", site, "--json").stdout)
        low, middle, high = verified["epsilon_prv"]
        assert len(found["entries"]) == verified["releases"] == ROUNDS
        assert found["epsilon"] == pytest.approx(verified["epsilon"], abs=1e-9)
        assert abs(found["epsilon"] - middle) <= 1e-3 or low <= found["epsilon"] <= high
        assert found["epsilon"] <= verified["epsilon_rdp_bound"] + 1e-9
        assert found["entries"][-1]["epsilon_total"] == pytest.approx(found["epsilon"], abs=1e-9)


def test_a_folder_that_is_not_a_demos_is_left_as_it_is(tmp_path, plan_file, hospitals) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    refused = _demo(tmp_path, plan_file, hospitals)
    assert refused.returncode == 19
    assert "PF904" in refused.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_no_slide_name_path_or_patient_is_in_anything_that_left_a_site(demo, hospitals) -> None:
    """Everything the server holds, record, logs and databases included, and the report: identifiers from inside slides as well."""
    out, _ = demo
    secrets: set[bytes] = set()
    for patient_list in hospitals.glob("*/patients.csv"):
        with patient_list.open(newline="") as file:
            for row in csv.DictReader(file):
                secrets |= {row["slide"].encode(), Path(row["slide"]).stem.encode(), row["patient"].encode()}
    secrets = {secret for secret in secrets if len(secret) >= 6}  # shorter ones come up by chance in tensors
    words = planted_words()
    slides = b"".join(path.read_bytes() for path in hospitals.rglob("*") if path.is_file())
    assert found_in(slides, words) == words, "there is something to leak"
    for file in [out / "report.html", *(path for path in (out / "server").rglob("*") if path.is_file())]:
        data = file.read_bytes()
        assert not [secret for secret in secrets if secret in data], file
        assert not [word for word in words if word.encode() in data], file
        # In every form: all words in small files and heads, one of each kind in large ones, which would take minutes.
        few = {mark("ImageDescription"), mark("AperioBarcode"), mark("ColumnName")}
        assert found_in(data[: 1 << 16], words) | found_in(data if file.suffix != ".safetensors" else b"", few) == set(), file


def test_self_distillation_runs_from_slides_to_a_verified_teacher(tmp_path, hospitals, leaves_no_process) -> None:
    """`pathfed demo --objective dino` with its ready plan; without time slots, which would be most of its time."""
    out = tmp_path / "out"
    done = _run(
        "pathfed", "demo", "--objective", "dino", "--out", out, "--slides", hospitals, "--sites", 2, "--rounds", 2, "--no-reply-slots"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_plan((out / "plan.toml").read_text(), where="plan.toml").objective.name == "dino"
    verified = _run("pathfed", "verify", out / "record", "--trust", out / "trust.json", "--json")
    said = json.loads(verified.stdout)
    assert (verified.returncode, said["identities_proven"], said["rounds"]) == (0, True, 2)
    assert [site["rounds"] for site in said["sites"].values()] == [2, 2]
    # What is released is the teacher, which follows the student and was trained by nobody.
    record = out / "record"
    encoder = weights.load((record / "encoder" / "model.safetensors").read_bytes())
    first, last = (weights.load((record / "states" / f"round-{index:04d}.safetensors").read_bytes()) for index in (0, 2))
    for name, tensor in encoder.items():
        assert torch.equal(tensor, last[f"teacher.encoder.{name}"])
        assert torch.isfinite(tensor).all()
    for student in ("encoder.", "teacher.encoder."):
        assert any(not torch.equal(last[student + name], first[student + name]) for name in encoder), student
    assert any(not torch.equal(tensor, last[f"encoder.{name}"]) for name, tensor in encoder.items())
    VisionTransformer(preset("vit_tiny_patch16_224", img_size=128)).load_state_dict(encoder)


def test_mixed_real_slides_are_scanned_and_named_and_the_run_goes_on(tmp_path, plan_file, real_data, leaves_no_process) -> None:
    """Hospitals built from real tiles; real good and bad slides are mixed into one of them, with rows in its list."""
    slides = tmp_path / "hospitals"
    build = [sys.executable, str(real_data / "make_hospitals.py"), str(slides), "--hospitals", "2", "--patients", "6", "--groups", "4"]
    subprocess.run(build, check=True, capture_output=True)
    mixed = slides / "hospital-1"
    added = [path for kind in ("ok", "bad") for path in sorted((real_data / "slides" / kind).iterdir())]
    with (mixed / "patients.csv").open("a", newline="") as file:
        for number, path in enumerate(added):
            target = mixed / "slides" / path.name
            shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
            csv.writer(file).writerow([path.name, f"MIXED{number}"])
    out = tmp_path / "out"
    done = _demo(out, plan_file, slides, "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    status = json.loads(_run("pathfed-site", "status", "--home", out / "sites" / "hospital-1", "--json").stdout)
    reasons = status["plans"][0]["reasons"]
    assert set(reasons) >= {"PF205", "PF206", "PF207", "PF208"}, reasons
    assert status["plans"][0]["patients"] >= 6 + 2  # the listed six, and the real slides that are fit
    updates = out / "record" / "updates"
    assert _run("pathfed", "verify", out, "--trust", out / "trust.json", "--replay", updates).returncode == 0
