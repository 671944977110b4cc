"""`pathfed plan traffic`: the model's arithmetic by hand, its laws, and the command."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common.errors import HostError
from pathfed_common.plan import load_plan
from pathfed_common.provenance.documents import seal_plan
from pathfed_common.provenance.keys import SigningKey
from pathfed_local import cli, traffic_model
from pathfed_local.plan_traffic import duration, fewer_rounds, size, time_rows, traffic_rows
from pathfed_local.traffic_model import Conditions, Load, Variant, limiting_line, round_time, variants

TEXT = """
name = "lung-2027"
[privacy]
expected_patients = 64
noise_multiplier = 8.0
clip_norm = 1.0
epsilon_limit = 0.3
[rounds]
count = 24
reply_slot_s = 100
deadline_s = 900
[wire]
dtype = "bfloat16"
"""

loads = st.builds(
    Load,
    down=st.floats(1e6, 1e10),
    up=st.floats(1e6, 1e10),
    state_numbers=st.floats(1e6, 1e10),
    trained_numbers=st.floats(1e6, 1e10),
    slots=st.integers(1, 3),
)


def test_a_round_by_hand() -> None:
    """10 sites, 1 GB down and 0.5 GB up each, on 100 Mbit/s lines and a server's of 500: the server's line, shared, is the slower."""
    load = Load(down=1e9, up=0.5e9, state_numbers=0.25e9, trained_numbers=0.25e9, slots=2)
    given = Conditions(
        sites=10, site_mbit_s=100, server_mbit_s=500, compute_s=30, slot_s=20, admission_gb_s=1.0, aggregation_gb_s=2.0, step_gb_s=0.5
    )
    found = round_time(load, given)
    assert found.download_s == pytest.approx(10 * 8000 / 500 / 0.94)
    assert found.upload_s == pytest.approx(10 * 4000 / 500 / 0.94)
    assert (found.compute_s, found.wait_s) == (30, 10)
    assert found.admission_s == pytest.approx(0.5), "all but the last update were checked while others were still sending"
    assert found.aggregation_s == pytest.approx(10 * 0.5 / 2)
    assert found.step_s == pytest.approx(0.25e9 * 4 * 10 / 0.5e9)
    assert (found.sent, found.received) == (10e9, 5e9)
    assert found.bottleneck == "download"
    assert found.total_s == pytest.approx(sum(found.stages.values()))
    assert limiting_line(given) == "server"
    alone = round_time(load, replace(given, sites=1))
    assert alone.download_s == pytest.approx(8000 / 100 / 0.94), "one site has its own line to itself"
    assert limiting_line(replace(given, sites=1)) == "site"


def test_a_server_that_checks_more_slowly_than_updates_come_makes_the_round_wait() -> None:
    load, given = Load.of_numbers(1e9, "bfloat16"), Conditions(sites=10, server_mbit_s=100_000, site_mbit_s=100_000, admission_gb_s=0.1)
    found = round_time(load, given)
    assert found.admission_s == pytest.approx(10 * 20 - found.upload_s)


@given(load=loads, sites=st.integers(1, 500), line=st.floats(10, 1e5))
def test_more_sites_and_more_bytes_never_make_a_round_shorter_and_a_faster_line_never_longer(load: Load, sites: int, line: float) -> None:
    given = Conditions(sites=sites, site_mbit_s=line, server_mbit_s=10 * line)
    before = round_time(load, given)
    assert round_time(load, replace(given, sites=sites + 1)).total_s >= before.total_s
    assert round_time(replace(load, up=2 * load.up), given).total_s >= before.total_s
    assert round_time(replace(load, down=2 * load.down), given).total_s >= before.total_s
    faster = round_time(load, replace(given, site_mbit_s=2 * line, server_mbit_s=20 * line))
    assert faster.download_s == pytest.approx(before.download_s / 2)
    assert faster.upload_s <= before.upload_s
    assert faster.total_s <= before.total_s * (1 + 1e-12)


def test_numbers_on_the_way_have_the_sizes_of_the_wire_formats() -> None:
    by_name = {one.name: one.load for one in variants(256e6)}
    assert by_name["float32"].up == 1024e6
    assert by_name["bfloat16"].up == 512e6
    assert by_name["int8"].up == 256e6 + 4e6, "a scale of 4 bytes for each 256"
    assert {by_name[name].down for name in ("float32", "bfloat16", "int8")} == {1024e6}, "states travel as the server has them"
    assert by_name["int8, half frozen"].down == 512e6
    assert by_name["int8, adapters of 1%"].up == pytest.approx(2.56e6 + 0.04e6)


def test_fewer_and_larger_rounds_compute_as_much_and_send_less() -> None:
    rows = fewer_rounds(Load.of_numbers(1.9e9, "int8"), Conditions(), rounds=400, factors=(1, 4, 16))
    assert [row["rounds"] for row in rows] == ["400", "100", "25"]
    assert [row["compute in each"] for row in rows] == ["60 s", "4 min", "16 min"]
    shares = [int(row["share of time that computes"].rstrip("%")) for row in rows]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_rows_say_sizes_and_times_as_people_do() -> None:
    (row,) = time_rows([Variant("int8", Load.of_numbers(1.9e9, "int8"))], [Conditions()])
    assert (row["site line"], row["server line"], row["bottleneck"]) == ("100 Mbit/s", "1 Gbit/s", "download")
    (moved,) = traffic_rows([Variant("bfloat16", Load.of_numbers(1.9e9, "bfloat16"))], 50, 100)
    assert (moved["to a site"], moved["from a site"], moved["server sends"]) == ("7.6 GB", "3.8 GB", "380 GB")
    assert [duration(value) for value in (0.004, 1.5, 90, 600, 9000, 200_000, 1e9)] == [
        "4 ms",
        "1.5 s",
        "90 s",
        "10 min",
        "2.5 h",
        "2.31 days",
        "11,574 days",
    ]
    assert [size(value) for value in (500, 1.5e6, 2e9, 3.25e12, 1e15)] == ["0.5 kB", "1.5 MB", "2 GB", "3.25 TB", "1 PB"]


@pytest.mark.parametrize("name", ["sites", "site_mbit_s", "server_mbit_s", "admission_gb_s", "aggregation_gb_s", "step_gb_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_line_or_machine_that_cannot_be_is_refused(name: str, value: float) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(HostError, match=r"PF905.*--"):
        Conditions(**given)


def test_no_compute_and_no_slot_are_possible_and_less_is_not() -> None:
    assert Conditions(compute_s=0, slot_s=0).compute_s == 0
    with pytest.raises(HostError, match="PF905"):
        Conditions(compute_s=-1)


# The command.


@pytest.fixture
def pathfed(run_main):
    return partial(run_main, cli.main, "pathfed")


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    file = tmp_path / "lung.toml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_a_plans_own_model_slot_and_rounds_are_taken(pathfed, plan_file) -> None:
    said = pathfed("plan", "traffic", plan_file, "--sites", 10, "--json").json
    plan = load_plan(TEXT, where="lung.toml")
    load = Load.of_plan(plan)
    assert (said["subject"], said["sites"], said["rounds"], said["limiting_line"]) == ("lung-2027", 10, 24, "site")
    assert (said["down_bytes"], said["up_bytes"]) == (load.down, load.up)
    assert load.down == 2 * load.up > 20e6
    assert said["stages_s"]["wait"] == 50
    assert said["round_s"] == pytest.approx(round_time(load, Conditions(sites=10, slot_s=100)).total_s)
    assert [one["update"] for one in said["alternatives"]] == [one.name for one in traffic_model.variants(1.0)]


def test_a_signed_plan_is_read_too(pathfed, tmp_path) -> None:
    signed = tmp_path / "lung.dsse"
    signed.write_bytes(seal_plan(load_plan(TEXT, where="x"), SigningKey.generate()))
    assert pathfed("plan", "traffic", signed, "--json").json["subject"] == "lung-2027"


def test_people_are_told_the_slowest_stage_and_what_else_could_be_done(pathfed) -> None:
    done = pathfed("plan", "traffic", "--parameters", "1.9e9", "--rounds", 100)
    assert done.status == 0
    for words in ("slowest stage", "download", "the server's", "380 GB", "int8, adapters of 1%", "100 rounds"):
        assert words in done.out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], "PF905"),
        (["lung.toml", "--parameters", "1e9"], "PF905"),
        (["--parameters", "0"], "PF905"),
        (["--parameters", "nan"], "PF905"),
        (["--parameters", "1e9", "--sites", "0"], "PF905"),
        (["--parameters", "1e9", "--site-mbit-s", "-5"], "PF905"),
        (["--parameters", "1e9", "--step-gb-s", "inf"], "PF905"),
        (["--parameters", "1e9", "--slot-s", "-1"], "PF905"),
        (["nowhere.toml"], "PF904"),
        (["broken.toml"], "PF101"),
    ],
)
def test_bad_options_get_a_code(pathfed, plan_file, tmp_path, monkeypatch, options, code) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("name = ")
    assert pathfed("plan", "traffic", *options, "--json").code == code
