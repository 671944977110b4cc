"""What the demo makes of its options. The demo itself runs in tests/end_to_end."""

import io

import pytest
from rich.console import Console

from pathfed_common.errors import HostError, PathfedError
from pathfed_common.plan import Plan, load_plan
from pathfed_local.consortium import Hospital
from pathfed_local.demo import MARK, Demo, DemoOptions, _listed_patients, _plan_text
from pathfed_local.folders import fresh_folder
from pathfed_local.plans import demo_plan
from pathfed_local.view import SiteLine, View


def hospital(tmp_path, name: str, patients: int, header: str = "slide,patient", delimiter: str = ",") -> Hospital:
    folder = tmp_path / name
    (folder / "slides").mkdir(parents=True)
    lines = [header, *(f"{number}.tif{delimiter}P{number}" for number in range(patients))]
    (folder / "patients.csv").write_text("\n".join(lines))
    return Hospital(name=name, slides=folder / "slides", patients=folder / "patients.csv")


def options(tmp_path, **changes) -> DemoOptions:
    given = {"out": tmp_path / "out", "slides": None, "plan": demo_plan(), "rounds": None, "sites": 3, "keep": False, **changes}
    return DemoOptions(**given)


def fitted(tmp_path, hospitals: list[Hospital], **changes) -> Plan:
    return load_plan(_plan_text(options(tmp_path, **changes), hospitals), where="fitted")


def test_large_hospitals_get_the_plan_as_it_is(tmp_path):
    hospitals = [hospital(tmp_path, name, 40) for name in "abc"]
    assert fitted(tmp_path, hospitals) == load_plan(demo_plan().read_text(), where="demo")


def test_the_plan_is_fitted_to_the_smallest_hospital_the_number_of_them_and_the_rounds_asked_for(tmp_path):
    hospitals = [hospital(tmp_path, "a", 40), hospital(tmp_path, "b", 10)]
    plan = fitted(tmp_path, hospitals[1:], rounds=7)
    assert (plan.privacy.expected_patients, plan.rounds.quorum, plan.rounds.count) == (4.0, 1, 7)
    assert fitted(tmp_path, hospitals).privacy.expected_patients == 4.0


def test_any_spelling_of_a_plan_is_fitted(tmp_path):
    spelled = tmp_path / "plan.toml"
    spelled.write_text(
        'name="other"\nrounds={count=5,deadline_s=100}\n[site_weights]\na=2\n'
        "[privacy]\nexpected_patients=16.0 # many\nnoise_multiplier=1\nclip_norm=1\nepsilon_limit=8\n"
    )
    plan = fitted(tmp_path, [hospital(tmp_path, "a", 10)], plan=spelled, rounds=2)
    assert (plan.rounds.count, plan.rounds.quorum, plan.rounds.deadline_s) == (2, 1, 100)
    assert (plan.privacy.expected_patients, plan.site_weights) == (4.0, {"a": 2.0})


def test_a_plan_with_cohort_rules_keeps_them(tmp_path):
    text = demo_plan().read_text() + (
        '\n[cohort.include]\norgan = ["Lung", "l\\"iver"]\n[[cohort.tile_weights]]\nattribute = "stain"\nvalue = "IHC"\nweight = 0.5\n'
    )
    (tmp_path / "plan.toml").write_text(text)
    plan = fitted(tmp_path, [hospital(tmp_path, "a", 40)], plan=tmp_path / "plan.toml")
    assert plan.cohort == load_plan(text, where="given").cohort
    assert plan.cohort.include.organ == ("Lung", 'l"iver')


@pytest.mark.parametrize(("text", "code"), [("name = ", "PF101"), ("name = 'a'\nsigma = 1", "PF10"), (None, "PF904")])
def test_a_plan_that_cannot_be_used_is_told(tmp_path, text, code):
    file = tmp_path / "plan.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PathfedError, match=code):
        fitted(tmp_path, [hospital(tmp_path, "a", 10)], plan=file)


def test_patients_are_counted_as_the_scan_counts_them(tmp_path):
    assert _listed_patients(hospital(tmp_path, "a", 12).patients) == 12
    assert _listed_patients(hospital(tmp_path, "b", 9, "Slide;Patient", ";").patients) == 9
    assert _listed_patients(hospital(tmp_path, "c", 5, "file,person").patients) == 0
    assert _listed_patients(tmp_path / "none.csv") == 0


def test_an_earlier_demo_is_replaced_and_anything_else_left_as_it_is(tmp_path):
    out = fresh_folder(tmp_path / "out", MARK, "a demo")
    (out / "old").write_text("old")
    assert fresh_folder(tmp_path / "out", MARK, "a demo") == out.resolve()
    assert [path.name for path in out.iterdir()] == [MARK]
    (out / MARK).unlink()
    (out / "mine").write_text("mine")
    for taken in (out, out / "mine"):
        with pytest.raises(HostError, match=r"PF904.*not a demo"):
            fresh_folder(taken, MARK, "a demo")
    assert (out / "mine").read_text() == "mine"


def test_a_demo_without_hospitals_ends_at_once_and_makes_no_home(tmp_path):
    told = io.StringIO()
    (tmp_path / "empty").mkdir()
    with pytest.raises(PathfedError, match="PF201"):
        Demo(options(tmp_path, slides=tmp_path / "empty"), View(Console(file=told))).run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MARK]


def test_a_demo_that_fails_tells_its_phase_and_ends_its_processes(tmp_path):
    told = io.StringIO()
    hospital(tmp_path / "data", "a", 3)
    with pytest.raises(PathfedError, match="PF201"):  # no slide in its folder
        Demo(options(tmp_path, slides=tmp_path / "data"), View(Console(file=told))).run()
    lines = told.getvalue()
    assert "✗ scanning slides" in lines
    assert "✓ every process is ended" in lines


def test_the_table_shows_every_site_and_events_by_their_gravity():
    told = io.StringIO()
    view = View(Console(file=told, width=120))
    line = SiteLine(site="site-a", state="[round 1]", slides="4 (3)", patients=2, rounds=1, epsilon_spent=1.234, epsilon_left=8.766)
    view.update("before", [line])  # no table is open: nothing to show it in
    with view.table():
        view.update("run demo", [line], notes=["a note"])
    view.event("PF903 [x] ended")
    text = told.getvalue()
    for part in ("run demo", "site-a", "[round 1]", "4 (3)", "1.23", "8.77", "a note", "PF903 [x] ended"):
        assert part in text
    assert "before" not in text
