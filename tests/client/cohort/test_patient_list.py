import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.cohort.patient_list import PatientRow, decode_patient_list, match, parse_patient_list, pseudonym, slide_key
from pathfed_common.errors import SiteDataError

ROWS = (PatientRow("a.svs", "P1", 2), PatientRow("b.svs", "P2", 3))
KEY = bytes(range(32))


@pytest.mark.parametrize(
    "text",
    [
        "slide,patient\na.svs,P1\nb.svs,P2\n",
        "slide;patient\r\na.svs;P1\r\nb.svs;P2\r\n",
        "slide\tpatient\na.svs\tP1\nb.svs\tP2",
        "\ufeffSlide , PATIENT\n a.svs , P1 \nb.svs,P2\n",
        'id,patient,note,slide\n1,P1,"a, b; c",a.svs\n2,P2,,b.svs\n',
        "slide;patient;note\na.svs;P1;x,y,z\nb.svs;P2;\n",
    ],
    ids=["comma", "semicolon", "tab", "bom and case", "more columns", "commas in another column"],
)
def test_exports_of_many_forms_give_the_same_rows(text):
    assert parse_patient_list(text, where="p.csv") == ROWS


def test_empty_lines_are_skipped_and_line_numbers_stay_true():
    rows = parse_patient_list('slide,patient\n\na.svs,"P\n1"\n,\nb.svs,P2\n', where="p.csv")
    assert [(row.slide, row.line) for row in rows] == [("a.svs", 4), ("b.svs", 6)]


@pytest.mark.parametrize(
    ("text", "missing", "found"),
    [
        ("slide,case\na,1\n", "wrong: patient", "columns found: slide, case"),
        ("file;mrn\na;1\n", "wrong: slide, patient", "columns found: file, mrn"),
        ("slide,slide,patient\na,b,1\n", "wrong: slide", "columns found: slide, slide, patient"),
        ("slide patient\na 1\n", "wrong: slide, patient", "columns found: slide patient"),
    ],
)
def test_missing_columns_are_named_with_what_was_found(text, missing, found):
    with pytest.raises(SiteDataError) as caught:
        parse_patient_list(text, where="p.csv")
    assert caught.value.code == "PF202"
    assert missing in caught.value.what
    assert caught.value.value == found
    assert caught.value.where == "p.csv, line 1"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "p.csv"),
        ("\nslide,patient\na,1\n", "p.csv"),
        ("slide,patient\n", "p.csv"),
        ("slide,patient\na.svs,P1\nb.svs,\n", "p.csv, line 3"),
        ("slide,patient\n  ,P1\n", "p.csv, line 2"),
        ("patient,slide\nP1\n", "p.csv, line 2"),
        ('slide,patient\na,"' + "x" * 200_000 + '"\n', "p.csv, line 2"),
    ],
    ids=["empty", "header not first", "no rows", "no patient", "no slide", "short row", "absurd field"],
)
def test_unusable_lists_are_refused_with_their_place(text, where):
    with pytest.raises(SiteDataError) as caught:
        parse_patient_list(text, where="p.csv")
    assert caught.value.code == "PF202"
    assert caught.value.where == where


@pytest.mark.parametrize("patient", ["P2", "P1"], ids=["another patient", "the same patient"])
def test_slide_listed_twice_is_refused_with_both_lines(patient):
    with pytest.raises(SiteDataError) as caught:
        parse_patient_list(f"slide,patient\na.svs,P1\nb.svs,P1\n./a.svs,{patient}\n", where="p.csv")
    assert caught.value.code == "PF203"
    assert caught.value.where == "p.csv, lines 2 and 4"
    assert caught.value.value == "a.svs"


def test_errors_do_not_show_patient_identifiers():
    with pytest.raises(SiteDataError) as caught:
        parse_patient_list("slide,patient\na.svs,MRN-SECRET\na.svs,MRN-SECRET\n", where="p.csv")
    assert "SECRET" not in str(caught.value)
    assert "SECRET" not in repr(PatientRow("a.svs", "MRN-SECRET", 2))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_spreadsheet_encodings_are_read(encoding):
    text = "slide,patient\nä.svs,P1\n"
    assert decode_patient_list(text.encode(encoding), where="p.csv") == text


def test_other_encodings_are_refused():
    with pytest.raises(SiteDataError, match=r"PF202.*byte 14"):
        decode_patient_list("slide,patient\nä.svs,P1\n".encode("latin-1"), where="p.csv")


SLIDES = {
    "x/a.svs": {"x/a.svs", "a.svs"},
    "y/a.svs": {"y/a.svs", "a.svs"},
    "b.svs": {"b.svs"},
    "y/b.svs": {"y/b.svs", "b.svs"},
    "series": {"series", "series/1.dcm", "1.dcm", "series/2.dcm", "2.dcm"},
}


def matched(*pairs):
    rows = [PatientRow(slide_key(slide), patient, line) for line, (slide, patient) in enumerate(pairs, start=2)]
    return match(rows, SLIDES, where="p.csv")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("x/a.svs", "x/a.svs"),
        ("x\\a.svs", "x/a.svs"),
        ("b.svs", "b.svs"),
        ("series", "series"),
        ("2.dcm", "series"),
        ("series/1.dcm", "series"),
    ],
)
def test_a_slide_may_be_named_by_path_file_or_series(name, path):
    matching = matched((name, "P1"))
    assert {path: row.patient for path, row in matching.patients.items()} == {path: "P1"}
    assert matching.missing == matching.ambiguous == ()


def test_rows_without_a_slide_are_told_apart_from_rows_that_fit_several():
    matching = matched(("gone.svs", "P1"), ("a.svs", "P2"), ("b.svs", "P3"))
    assert [row.line for row in matching.missing] == [2]
    assert [row.line for row in matching.ambiguous] == [3]
    assert list(matching.patients) == ["b.svs"]


def test_files_of_one_series_may_all_be_listed_for_one_patient_but_not_for_two():
    assert list(matched(("1.dcm", "P1"), ("2.dcm", " p1")).patients) == ["series"]
    with pytest.raises(SiteDataError, match=r"PF203.*lines 2 and 3"):
        matched(("1.dcm", "P1"), ("2.dcm", "P2"))


def test_unicode_spellings_of_one_file_name_match():
    composed, decomposed = "gr\u00fcn.svs", "gru\u0308n.svs"
    matching = match([PatientRow(slide_key(composed), "P1", 2)], {decomposed: {decomposed}}, where="p.csv")
    assert list(matching.patients) == [decomposed]


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


@given(st.text() | st.text(alphabet='slide,patient;\t\r\n"ab').map("slide,patient\n".__add__))
def test_any_text_is_parsed_or_refused_with_a_code(text):
    try:
        rows = parse_patient_list(text, where="p.csv")
    except SiteDataError:
        return
    assert all(row.slide and row.patient for row in rows)
