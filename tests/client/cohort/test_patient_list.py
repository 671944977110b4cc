"""What the lines of a patient list mean, each by itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.cohort.patient_list import Finding, PatientRow, ScannerRow, pseudonym, read_patient_list, slide_key
from pathfed_common.errors import ErrorCode, SiteDataError

KEY = bytes(range(32))


def listed(text: str, **columns: str):
    return read_patient_list(text.encode(), where="p.csv", columns=columns)[1]


def one_row(header: str, *cells: str) -> PatientRow:
    (row,) = listed(f"slide;patient;{header}\na.svs;P1;{';'.join(cells)}\n").rows
    return row


def fault(header: str, *cells: str) -> Finding:
    found = listed(f"slide;patient;{header}\nb.svs;P2{';' * len(cells)}\na.svs;P1;{';'.join(cells)}\n")
    assert [row.slide for row in found.rows] == ["b.svs"]
    (finding,) = found.unusable
    assert (finding.code, finding.lines, finding.slide) == (ErrorCode.LIST_LINE_UNUSABLE, (3,), "a.svs")
    return finding


def test_rows_hold_slide_patient_line_and_what_else_is_given():
    found = listed("slide,patient,organ,stain,block,scanner\n./x\\a.svs, P1 , Lung ,H&E,,GT 450\nb.svs,P2,,,,\n")
    assert found.rows == (
        PatientRow("x/a.svs", "P1", 2, {"organ": "lung", "stain": "h&e", "scanner": "gt 450"}),
        PatientRow("b.svs", "P2", 3, {}),
    )
    assert found.unusable == found.scanners == ()


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2021-03-04", "2021-03-04"),
        ("2021-03-04 17:05:00", "2021-03-04"),
        ("2021-03-04T17:05:00Z", "2021-03-04"),
        ("2021/03/04", "2021-03-04"),
        ("20210304", "2021-03-04"),
        ("04.03.2021", "2021-03-04"),
        ("4.3.2021 17:05", "2021-03-04"),
    ],
)
def test_days_are_read_where_they_can_be_one_day_only(text, day):
    assert one_row("acquired", text).attributes == {"acquired": day}


@pytest.mark.parametrize("text", ["03/04/2021", "2021-13-01", "2021-02-29", "4 March 2021", "31.4.2021", "44259", "2021-3-4", "04.03.21"])
def test_days_that_could_be_two_or_none_make_their_line_unusable(text):
    assert "YYYY-MM-DD" in fault("acquired", text).what


@given(st.dates())
def test_every_day_comes_back(day):
    assert one_row("acquired", day.isoformat()).attributes["acquired"] == day.isoformat()


@pytest.mark.parametrize(("text", "mpp"), [("0.2503", 0.2503), ("0,25", 0.25), ("2.5e-1", 0.25), ("0.1", 0.1), ("2", 2.0)])
def test_a_resolution_is_read_with_point_or_comma(text, mpp):
    assert float(one_row("mpp", text).attributes["mpp"]) == mpp


@pytest.mark.parametrize(
    "text", ["28.97", "352.8", "1000", "0", "-0.25", "0.0999", "2.0001", "nan", "inf", "40x", "1.000,25", "0.25 um", "1,0,0"]
)
def test_an_implausible_resolution_makes_its_line_unusable(text):
    assert "mpp" in fault("mpp", text).what


@given(st.floats())
def test_a_resolution_is_kept_exactly_where_it_is_plausible(value):
    found = listed(f"slide;patient;mpp\na;1;{value!r}\n")
    if 0.1 <= value <= 2.0:
        assert float(found.rows[0].attributes["mpp"]) == value
    else:
        assert [finding.lines for finding in found.unusable] == [(2,)]


@pytest.mark.parametrize("patient", ["", " ", "-", "?", "N/A", "#N/A", "null", "NaN", "Unknown", "unbekannt"])
def test_a_line_without_a_patient_is_unusable(patient):
    (finding,) = listed(f"slide,patient\na.svs,{patient}\n").unusable
    assert (finding.what, finding.slide) == ("there is no patient", "a.svs")


@pytest.mark.parametrize("patient", ["1.23E+12", "4,7e+11"])
def test_a_number_that_a_spreadsheet_rounded_is_nobodys(patient):
    (finding,) = listed(f"slide;patient\na.svs;{patient}\n").unusable
    assert "rounded" in finding.what


@pytest.mark.parametrize("patient", ["0", "NA-7", "E+12", "1E12", "P-4711", "none@x"])
def test_odd_patient_numbers_are_patients(patient):
    assert [row.patient for row in listed(f"slide,patient\na.svs,{patient}\n").rows] == [patient]


def test_a_line_without_a_slide_is_unusable_and_concerns_none():
    (finding,) = listed("slide,patient\n ,P1\n").unusable
    assert (finding.what, finding.slide, finding.lines) == ("the slide is empty", None, (2,))


def test_a_line_with_more_fields_than_the_header_is_unusable():
    (finding,) = listed("slide,patient,organ\na.svs,P1,lung,left\n").unusable
    assert "more fields" in finding.what


def test_one_line_gives_a_whole_scanner_its_resolution():
    found = listed("slide;patient;scanner;mpp\n*;;GT 450;0,263\na.svs;P1;gt 450;\n")
    assert found.scanners == (ScannerRow("gt 450", "0.263", 2),)
    assert [row.slide for row in found.rows] == ["a.svs"]


@pytest.mark.parametrize(
    ("line", "scanners"),
    [
        ("*;;GT 450;28.97", (ScannerRow("gt 450", None, 2),)),
        ("*;;GT 450;", (ScannerRow("gt 450", None, 2),)),
        ("*;;;0.25", ()),
        ("*;P1;;", ()),
    ],
)
def test_a_line_for_a_scanner_that_cannot_be_used_is_listed_and_gives_nothing(line, scanners):
    found = listed(f"slide;patient;scanner;mpp\n{line}\n")
    assert found.scanners == scanners
    assert [finding.lines for finding in found.unusable] == [(2,)]
    assert found.rows == ()


def test_nothing_that_is_shown_holds_a_patient():
    found = listed("slide,patient,acquired\na.svs,MRN-SECRET,never\nb.svs,MRN-SECRET,\n")
    assert "SECRET" not in repr(found)


@given(st.binary() | st.text(alphabet='slide,patient;*mpp\t\r\n"ab01.').map(lambda text: ("slide,patient,mpp,scanner\n" + text).encode()))
def test_any_bytes_are_understood_or_refused_and_no_line_is_lost(data):
    try:
        table, found = read_patient_list(data, where="p.csv")
    except SiteDataError:
        return
    lines = [row.line for row in found.rows] + [finding.lines[0] for finding in found.unusable]
    lines += [row.line for row in found.scanners if row.mpp is not None]
    assert sorted(lines) == [line.number for line in table.lines]
    assert all(row.slide and row.patient for row in found.rows)


@pytest.mark.parametrize("name", ["x/a.svs", " x\\a.svs ", "./x/a.svs"])
def test_slide_names_are_compared_in_one_form(name):
    assert slide_key(name) == "x/a.svs"
    assert slide_key("X/a.svs") != "x/a.svs"


def test_pseudonym_is_keyed_fixed_and_short():
    name = pseudonym(KEY, "MRN1")
    assert name == pseudonym(KEY, "MRN1")
    assert name == "ac9c8f1426c930b5ff5dadcd15b1a64c"  # HMAC-SHA256 of "mrn1", by openssl
    assert name != pseudonym(bytes(32), "MRN1")
    assert name != pseudonym(KEY, "MRN2")


@pytest.mark.parametrize("spelling", ["mrn1", " MRN1 ", "\uff2d\uff32\uff2e1"])
def test_spellings_of_one_patient_are_one_patient(spelling):
    assert pseudonym(KEY, spelling) == pseudonym(KEY, "MRN1")


def test_short_key_is_refused():
    with pytest.raises(ValueError, match="32 bytes, got 5"):
        pseudonym(b"short", "MRN1")
