"""The list laid against the slides that are there: certain, or out with a code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.cohort.matching import match, names_and_stems
from pathfed_client.cohort.patient_list import read_patient_list
from pathfed_common.errors import ErrorCode

SUFFIXES = (".svs", ".tif", ".dcm")
NAMES = {
    "x/a.svs": {"x/a.svs", "a.svs"},
    "y/a.svs": {"y/a.svs", "a.svs"},
    "b.svs": {"b.svs"},
    "y/b.svs": {"y/b.svs", "b.svs"},
    "c.svs": {"c.svs"},
    "c.tif": {"c.tif"},
    "d.e.tif": {"d.e.tif"},
    "series": {"series", "series/1.dcm", "1.dcm", "series/2.dcm", "2.dcm"},
}
SLIDES = {path: names_and_stems(names, SUFFIXES) for path, names in NAMES.items()}


def matched(*lines: str, header: str = "slide;patient", slides=SLIDES):
    return match(read_patient_list("\n".join([header, *lines]).encode(), where="p.csv")[1], slides)


def outcome(matching) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {path: (finding.code, finding.lines) for path, finding in matching.refused.items()}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("x/a.svs", "x/a.svs"),
        ("x\\a.svs", "x/a.svs"),
        ("x/a", "x/a.svs"),
        ("b.svs", "b.svs"),
        ("c.tif", "c.tif"),
        ("d.e", "d.e.tif"),
        ("series", "series"),
        ("2.dcm", "series"),
        ("series/1.dcm", "series"),
        ("2", "series"),
    ],
)
def test_a_slide_may_be_named_by_path_file_stem_or_series(name, path):
    matching = matched(f"{name};P1")
    assert {path: slide.patient for path, slide in matching.slides.items()} == {path: "P1"}
    assert matching.missing == matching.ambiguous == ()
    assert matching.refused == {}


@pytest.mark.parametrize("name", ["a.svs", "a", "c", "b"])
def test_a_name_that_several_slides_have_counts_for_none(name):
    matching = matched(f"{name};P1")
    assert [row.line for row in matching.ambiguous] == [2]
    assert matching.slides == matching.refused == {}


@pytest.mark.parametrize("name", ["gone.svs", "d", "B.svs", "a.sv", "x", "erie", "series/", "/b.svs", "d.e.svs"])
def test_a_name_that_is_nearly_right_is_missing_and_never_guessed(name):
    matching = matched(f"{name};P1")
    assert [row.line for row in matching.missing] == [2]
    assert matching.slides == matching.refused == {}


def test_only_a_slides_own_suffix_is_left_out():
    assert names_and_stems({"2024.17", "x/a.SVS", ".svs", "x/.tif"}, SUFFIXES) == {"2024.17", "x/a.SVS", "x/a", ".svs", "x/.tif"}


def test_two_lines_that_say_the_same_are_one():
    matching = matched("c.svs;P1;lung;", "c.svs; p1 ;;HE", header="slide;patient;organ;stain")
    assert matching.slides["c.svs"].attributes == {"organ": "lung", "stain": "he"}
    assert matching.slides["c.svs"].lines == (2, 3)


@pytest.mark.parametrize("second", ["c.svs", "./c.svs"])
def test_a_slide_of_two_patients_is_out_with_both_lines_and_the_rest_goes_on(second):
    matching = matched("c.svs;P1", "c.tif;P1", f"{second};P2")
    assert outcome(matching) == {"c.svs": (ErrorCode.SLIDE_LISTED_TWICE, (2, 4))}
    assert list(matching.slides) == ["c.tif"]


def test_two_names_of_one_slide_are_one_slide():
    assert outcome(matched("x/a.svs;P1", "x/a;P2")) == {"x/a.svs": (ErrorCode.SLIDE_LISTED_TWICE, (2, 3))}
    assert list(matched("1.dcm;P1", "2.dcm; p1").slides) == ["series"]
    assert outcome(matched("1.dcm;P1", "2.dcm;P2")) == {"series": (ErrorCode.SLIDE_LISTED_TWICE, (2, 3))}


@pytest.mark.parametrize(
    ("column", "left", "right"),
    [
        ("organ", "lung", "liver"),
        ("stain", "HE", "IHC"),
        ("block", "A1", "A2"),
        ("acquired", "2021-01-01", "2021-01-02"),
        ("scanner", "x", "y"),
        ("cancer type", "x", "y"),
        ("mpp", "0.25", "0.5"),
    ],
)
def test_lines_that_contradict_each_other_take_the_slide_out(column, left, right):
    matching = matched(f"c.svs;P1;{left}", f"c.svs;P1;{right}", "c.tif;P1;", header=f"slide;patient;{column}")
    assert outcome(matching) == {"c.svs": (ErrorCode.SLIDE_LINES_CONFLICT, (2, 3))}
    assert column.replace(" ", "_") in matching.refused["c.svs"].what
    assert list(matching.slides) == ["c.tif"]


def test_two_patients_are_worse_than_a_contradiction():
    matching = matched("c.svs;P1;lung", "c.svs;P2;liver", header="slide;patient;organ")
    assert matching.refused["c.svs"].code is ErrorCode.SLIDE_LISTED_TWICE


def test_an_unusable_line_takes_out_every_slide_that_its_name_fits_even_if_another_line_is_fine():
    matching = matched("c.svs;P1", "c.svs;", "a.svs;unknown", "x/a.svs;P1")
    assert outcome(matching) == {
        "c.svs": (ErrorCode.LIST_LINE_UNUSABLE, (3,)),
        "x/a.svs": (ErrorCode.LIST_LINE_UNUSABLE, (4,)),
        "y/a.svs": (ErrorCode.LIST_LINE_UNUSABLE, (4,)),
    }
    assert matching.slides == {}


MPP = "slide;patient;scanner;mpp"


def test_a_scanners_resolution_counts_for_its_slides_that_give_none_themselves():
    matching = matched("*;;S1;0.25", "c.svs;P1;s1;", "c.tif;P1;S1;0.5", "d.e.tif;P1;S2;", "x/a.svs;P1;;", header=MPP)
    assert {path: slide.mpp for path, slide in matching.slides.items()} == {"c.svs": 0.25, "c.tif": 0.5, "d.e.tif": None, "x/a.svs": None}


def test_a_scanner_listed_twice_alike_is_one():
    assert matched("*;;S1;0.25", "*;;S1;0,250", "c.svs;P1;S1;", header=MPP).slides["c.svs"].mpp == 0.25


@pytest.mark.parametrize(("second", "code"), [("0.26", ErrorCode.SLIDE_LINES_CONFLICT), ("28.97", ErrorCode.LIST_LINE_UNUSABLE)])
def test_a_scanner_in_doubt_takes_out_the_slides_that_would_have_used_it(second, code):
    matching = matched("*;;S1;0.25", f"*;;S1;{second}", "c.svs;P1;S1;", "c.tif;P1;S1;0.5", "d.e.tif;P1;S2;", header=MPP)
    assert outcome(matching) == {"c.svs": (code, (4, 2, 3))}
    assert set(matching.slides) == {"c.tif", "d.e.tif"}


def test_unicode_spellings_of_one_file_name_match_unless_both_are_there():
    composed, decomposed = "gr\u00fcn.svs", "gru\u0308n.svs"
    assert list(matched(f"{composed};P1", slides={decomposed: {decomposed}}).slides) == [decomposed]
    both = matched(f"{composed};P1", slides={decomposed: {decomposed}, composed: {composed}})
    assert both.slides == {}
    assert len(both.ambiguous) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from([*SLIDES, "a", "c", "2.dcm", "gone"]), st.sampled_from(["P1", "p1", "P2", ""])), max_size=12, min_size=1
    )
)
def test_no_slide_is_given_to_a_patient_while_a_line_says_otherwise(pairs):
    matching = matched(*(f"{name};{patient}" for name, patient in pairs))
    for path, slide in matching.slides.items():
        said = {patient.casefold() for name, patient in pairs if name in SLIDES[path] and (name == path or name not in SLIDES)}
        assert slide.patient.casefold() in said
        exact = {patient.casefold() for name, patient in pairs if name == path}
        assert exact <= {slide.patient.casefold()}
    assert not set(matching.slides) & set(matching.refused)
