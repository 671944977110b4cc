"""`pathfed plan privacy`: figures that the accountant gives, a picture that is whole, and errors with codes."""

import itertools
import json
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

import pytest

from pathfed_common.plan import Plan, load_plan
from pathfed_common.privacy.accounting import epsilon
from pathfed_common.provenance.documents import seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_local import cli, plan_privacy
from pathfed_local.plan_privacy import SITES, Asked, privacy_report, spread_rounds
from pathfed_local.privacy_chart import privacy_chart

#: Much noise: cheap to account for.
TEXT = """
name = "lung-2027"
[privacy]
expected_patients = 64
noise_multiplier = 8.0
clip_norm = 1.0
epsilon_limit = 0.3
[rounds]
count = 24
"""


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    file = tmp_path / "lung.toml"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def plan() -> Plan:
    return load_plan(TEXT, where="lung.toml")


@pytest.fixture
def pathfed(run_main):
    return partial(run_main, cli.main, "pathfed")


def test_json_has_every_round_at_one_two_and_three_sites(pathfed, plan_file) -> None:
    done = pathfed("plan", "privacy", plan_file, "--patients", 4000, "--json")
    assert done.status == 0
    rows = done.json["rounds"]
    assert [row["round"] for row in rows] == list(range(1, 25))
    for sites in SITES:
        for index in (1, 17, 24):
            expected = epsilon(sampling_rate=0.016, noise_multiplier=8.0, steps=index * sites, delta=1e-6)
            assert rows[index - 1][f"epsilon_at_{sites}_sites"] == expected
    assert (done.json["target_epsilon"], done.json["epsilon_limit"], done.json["at_sites"]) == (0.3, 0.3, 1)


def test_what_is_said_to_be_needed_meets_the_target(pathfed, plan_file, plan) -> None:
    asked = ["plan", "privacy", plan_file, "--patients", 4000, "--target-epsilon", 0.15, "--delta", 1e-5, "--at-sites", 2, "--json"]
    needed = pathfed(*asked).json["needed"]
    honest = {"noise_multiplier": 8.0, "expected_patients": 64, "rounds": 24, "patients": 4000}
    for name, found in needed.items():
        changed = {**honest, name: found["value"]}
        rate = changed["expected_patients"] / changed["patients"]
        steps = 2 * int(changed["rounds"])
        real = epsilon(sampling_rate=rate, noise_multiplier=changed["noise_multiplier"], steps=steps, delta=1e-5)
        assert real == found["epsilon"] <= 0.15, name
        assert found["code"] is None


def test_people_get_a_readable_number_of_rows_and_a_picture(pathfed, plan_file, tmp_path) -> None:
    picture = tmp_path / "lung.svg"
    done = pathfed("plan", "privacy", plan_file, "--patients", 4000, "--plot", picture)
    assert done.status == 0
    for words in ("epsilon at 3 sites", "sigma, at least", "B, at most", "rounds, at most", "N, at least"):
        assert words in done.out
    # A line of words that is broken beside the picture's path may begin with a number, too: "4,000 patients".
    numbered = [line for line in done.out.splitlines() if line.partition(" ")[0].isdigit()]
    assert (len(numbered), numbered[0].split()[0], numbered[-1].split()[0]) == (plan_privacy.ROWS, "1", "24")
    assert ElementTree.fromstring(picture.read_text(encoding="utf-8")).tag.endswith("svg")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--patients", 63], "PF105"),
        (["--patients", 0], "PF905"),
        ([], "PF905"),
        (["--patients", 4000, "--delta", 0], "PF905"),
        (["--patients", 4000, "--delta", 0.5], "PF905"),
        (["--patients", 4000, "--delta", "nan"], "PF905"),
        (["--patients", 4000, "--target-epsilon", 0], "PF905"),
        (["--patients", 4000, "--target-epsilon", "inf"], "PF905"),
        (["--patients", 64, "--target-epsilon", 1e-9], "PF311"),
        (["--patients", 4000, "--plot", "/nowhere/lung.svg"], "PF904"),
    ],
)
def test_bad_options_get_a_code(pathfed, plan_file, options, code) -> None:
    done = pathfed("plan", "privacy", plan_file, *options, "--json")
    assert done.code == code, done
    assert done.status in (11, 13, 19)


@pytest.mark.parametrize(
    ("content", "code"), [(b"", "PF104"), (b"\xff", "PF101"), (b"{}", "PF106"), (b"name = ", "PF101"), (None, "PF904")], ids=str
)
def test_a_file_that_is_no_plan_gets_a_code(pathfed, tmp_path, content, code) -> None:
    file = tmp_path / "plan.toml"
    if content is not None:
        file.write_bytes(content)
    done = pathfed("plan", "privacy", file, "--patients", 4000, "--json")
    assert done.code in (code, "PF102", "PF103", "PF104") if content == b"" else done.code == code


def test_a_signed_plan_is_read_too(plan, tmp_path) -> None:
    signed = tmp_path / "lung.plan.dsse"
    signed.write_bytes(seal_plan(plan, SigningKey.generate()))
    assert plan_privacy.read_any_plan(signed) == plan


def test_a_number_that_no_change_can_meet_is_told_beside_those_that_can(plan) -> None:
    report = privacy_report(plan, Asked(patients=4000, target=0.004, most_rounds=2))
    told = json.loads(json.dumps(report.to_dict()))["needed"]
    assert told["rounds"] == {"value": None, "epsilon": None, "code": "PF311"}
    assert told["noise_multiplier"]["epsilon"] <= 0.004
    assert [row["needed"] for row in report.needs()][2] == "none"


@pytest.mark.parametrize(
    ("count", "most", "rounds"), [(1, 11, (1,)), (5, 11, (1, 2, 3, 4, 5)), (100, 3, (1, 51, 100)), (1_000_000, 2, (1, 1_000_000))]
)
def test_rounds_are_spread_from_the_first_to_the_last(count: int, most: int, rounds: tuple[int, ...]) -> None:
    assert spread_rounds(count, most) == rounds


@pytest.mark.parametrize(
    "changes", [{"rounds": 1, "target": 0.05}, {"target": 0.28}, {"name": "a" * 63}], ids=lambda changes: next(iter(changes))
)
def test_the_picture_keeps_its_words_apart_and_inside(plan, changes) -> None:
    if "rounds" in changes:
        plan = plan.model_copy(update={"rounds": plan.rounds.model_copy(update={"count": 1})})
    if "name" in changes:
        plan = plan.model_copy(update={"name": changes["name"]})
    report = privacy_report(plan, Asked(patients=4000, target=changes.get("target"), most_rounds=3))
    drawing = ElementTree.fromstring(privacy_chart(report))
    texts = [node for node in drawing.iter() if node.tag.endswith("text")]
    ends = sorted(float(node.attrib["y"]) for node in texts if float(node.attrib["x"]) > 600 and node.attrib["text-anchor"] == "start")
    assert len(ends) == 3 + (2 if "target" in changes else 1)
    assert all(later - earlier >= 13 for earlier, later in itertools.pairwise(ends))
    assert all(0 < float(node.attrib["y"]) < 440 for node in texts)
    assert len([node for node in drawing.iter() if node.tag.endswith("circle")]) == 3
