"""Patient lists in the shapes that lab systems and spreadsheets write."""

import codecs
import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pathfed_client.cohort.list_file import REQUIRED, ROLES, SEPARATORS, decode_list, header_key, read_table
from pathfed_common.errors import SiteDataError

ENCODINGS = {
    "utf-8": ("UTF-8", b""),
    "utf-8 with mark": ("UTF-8", codecs.BOM_UTF8),
    "utf-16-le": ("UTF-16", b""),
    "utf-16-be": ("UTF-16", b""),
    "utf-16-le with mark": ("UTF-16", codecs.BOM_UTF16_LE),
    "utf-16-be with mark": ("UTF-16", codecs.BOM_UTF16_BE),
    "cp1252": ("Windows-1252", b""),
}


def encoded(text: str, name: str) -> bytes:
    return ENCODINGS[name][1] + text.encode(name.removesuffix(" with mark"))


def table(text: str | bytes, **configured: str):
    return read_table(text if isinstance(text, bytes) else text.encode(), where="p.csv", configured=configured)


def refusal(text: str | bytes, **configured: str) -> SiteDataError:
    with pytest.raises(SiteDataError) as caught:
        table(text, **configured)
    assert caught.value.code == "PF202"
    return caught.value


# Encodings


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_is_detected_and_told(name):
    text = "slide,patient\nM\xfcller.svs,P1\n"
    assert decode_list(encoded(text, name), where="p.csv") == (text, ENCODINGS[name][0])


@pytest.mark.parametrize(
    "data",
    [
        b"slide,patient\n\x81.svs,P1\n",  # no character of Windows-1252
        "slide,patient\n\xfc.svs,P1\n".encode() + b"\xe4.svs,P2\n",  # UTF-8, then Windows-1252
        codecs.BOM_UTF8 + b"slide,patient\n\xe4.svs,P1\n",
        codecs.BOM_UTF16_LE + b"s\0l\0i",
        codecs.BOM_UTF16_LE + b"\0\xd8,\0",  # a lone surrogate
        codecs.BOM_UTF16_BE + "a\0b".encode("utf-16-be"),
        b"slide,patient\n\0\0\0\0,P1\n",
    ],
    ids=["1252", "both", "marked", "odd", "surrogate", "zero in text", "zeros"],
)
def test_bytes_in_no_encoding_or_in_two_are_refused(data):
    error = refusal(data)
    assert "text" in error.what
    assert error.remedy == "save it again as CSV UTF-8"


def test_a_file_in_two_encodings_says_where():
    assert refusal("\xfc,".encode() + b"\xe4").value == "byte 3"


# The whole way, through every encoding and separator

CELL = st.text(st.sampled_from("aB9 ,;|\t\"'\n\r\u00fc\u00e9\u00df-_./"), max_size=12)


@given(
    rows=st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=8),
    encoding=st.sampled_from(sorted(ENCODINGS)),
    separator=st.sampled_from(sorted(SEPARATORS)),
    ending=st.sampled_from(["\n", "\r\n"]),
    titles=st.integers(0, 5),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_a_list_comes_back_as_it_was_written(rows, encoding, separator, ending, titles, quoting):
    if quoting == csv.QUOTE_MINIMAL:  # Python then writes a lone carriage return bare, as a line's end
        rows = [tuple(cell.replace("\r", "") for cell in row) for row in rows]
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=SEPARATORS[separator], lineterminator=ending, quoting=quoting)
    writer.writerow(["Note", "Slide ID", "PATIENT"])
    writer.writerows(rows)
    text = f"Report of the lab{ending}" * titles + out.getvalue()
    read = [row for row in rows if any(cell.strip() for cell in row)]
    if not read:
        assert "no lines" in refusal(encoded(text, encoding)).what
        return
    found = table(encoded(text, encoding))
    assert [(line.cells["slide"], line.cells["patient"]) for line in found.lines] == [(row[1].strip(), row[2].strip()) for row in read]
    assert (found.separator, found.header_line) == (separator, titles + 1)
    assert found.encoding == ENCODINGS[encoding][0] or text.isascii()
    assert not any(line.surplus for line in found.lines)


@given(st.binary() | st.text(alphabet='slide,patient;|\t\r\n"ab').map(lambda text: ("slide,patient\n" + text).encode()))
@example(b"")
@example(b"\xff\xfe")
@example(b'slide,patient\n"')
def test_any_bytes_are_read_or_refused_with_the_code(data):
    try:
        found = table(data)
    except SiteDataError:
        refusal(data)
        return
    assert set(REQUIRED) <= set(found.columns)
    assert [line.number for line in found.lines] == sorted({line.number for line in found.lines})


# The header


@pytest.mark.parametrize(
    "text",
    [
        "slide,patient\na,1\n",
        "slide;patient\r\na;1\r\n",
        "slide\tpatient\na\t1",
        "slide|patient\na|1\n",
        "Slide , PATIENT\n a , 1 \n",
        'id,patient,note,slide\n1,1,"a, b; c",a\n',
        "slide;patient;note\na;1;x,y,z\n",
        "sep=;\nslide;patient\na;1\n",
        "Lab export\n\n2024-01-01, ward 3\nslide,patient\na,1\n",
        '"an ""odd" title\nslide,patient\na,1\n',
        '"slide",patient,"two\nlines"\na,1,\n',
        "Image Name,MRN\na,1\n",
        "File_Name;Patient-ID;Accession No.\na;1;F1\n",
        "WSI;Patienten-ID;F\xe4rbung\na;1;HE\n",
    ],
)
def test_exports_of_many_forms_give_the_same_line(text):
    (line,) = table(text).lines
    assert (line.cells["slide"], line.cells["patient"]) == ("a", "1")


def test_line_numbers_stay_true_below_titles_empty_lines_and_line_breaks():
    found = table('Title\nslide,patient\n\na,"P\n1"\n,\nb,P2\n')
    assert [(line.cells["slide"], line.number) for line in found.lines] == [("a", 5), ("b", 7)]
    assert found.header_line == 2


def test_all_columns_are_found_by_well_known_names_and_the_rest_is_told():
    header = "Slide ID,MRN,Accession,Block,Organ,Tumour type,Staining,Scan date,Scanner model,\xb5m per pixel,Ward"
    found = table(f"{header}\n{',' * 10}x\n")
    assert list(found.columns) == list(ROLES)
    assert found.columns["mpp"] == "\xb5m per pixel"
    assert found.unused == ("Ward",)


def test_the_plain_name_wins_over_other_well_known_ones():
    found = table("path,slide,file name,patient\nx,a,y,1\n")
    assert (found.columns["slide"], found.unused) == ("slide", ("path", "file name"))


def test_configured_columns_are_taken_by_their_text_and_free_others():
    text = "Objekt,Person,slide,stain,tumor,tumour\na,1,no,HE,x,y\n"
    assert "two columns" in refusal(text, slide="objekt", patient="PERSON").what
    found = table(text, slide="objekt", patient="PERSON", cancer_type="Tumor", stain="")
    assert found.columns == {"slide": "Objekt", "patient": "Person", "cancer_type": "tumor"}
    assert found.lines[0].cells == {"slide": "a", "patient": "1", "cancer_type": "x"}


def test_a_configured_header_tells_the_header_line_apart_from_titles():
    found = table("slide,patient\nObjekt,Person\na,1\n", slide="Objekt", patient="Person")
    assert found.header_line == 2


@pytest.mark.parametrize(
    ("text", "configured", "what"),
    [
        ("", {}, "no line that names the columns"),
        ("\n\n \n", {}, "not found: slide, patient"),
        ("slide patient\na 1\n", {}, "not found: slide, patient"),
        ("slide,person\na,1\n", {}, "not found: patient"),
        ("file;person\na;1\n", {}, "not found: patient"),
        ("slide,slide,patient\na,b,1\n", {}, "two columns could be the slide: slide and slide"),
        ("path,file,patient\na,b,1\n", {}, "two columns could be the slide: path and file"),
        ("slide,patient,tumor,tumour\na,1,x,y\n", {}, "two columns could be the cancer_type: tumor and tumour"),
        ("slide,patient\na,1\n", {"organ": "Organ"}, "not found: organ"),
        ("slide,patient\na,1\n", {"slide": "Objekt"}, "not found: slide"),
        ("slide,patient\na,1\n", {"patient": ""}, "not found: patient"),
        ("slide,patient\n", {}, "no lines below its header"),
        ("x\n" * 20 + "slide,patient\na,1\n", {}, "not found"),
        ('slide,patient\na,"1\n', {}, "not CSV"),
        ('slide,patient\na,"1"2\n', {}, "not CSV"),
        (f'slide,patient\na,"{"x" * 200_000}"\n', {}, "not CSV"),
    ],
)
def test_lists_without_a_certain_header_are_refused_and_say_what_is_missing(text, configured, what):
    assert what in refusal(text, **configured).what


def test_the_refusal_shows_the_likeliest_header_and_its_line():
    error = refusal("Lab; of; pathology\nfile;person;ward\na;1;2\n")
    assert error.where == "p.csv, line 2"
    assert error.value == "columns found: file, person, ward"
    assert refusal('slide,patient\na,1\n\nb,"2\n').where == "p.csv, line 4"


@pytest.mark.parametrize("column", ["case", "Accession Number", "Block ID", "Fallnummer"])
def test_a_case_or_block_is_not_a_patient_unless_the_hospital_says_so(column):
    text = f"slide,{column}\na,1\n"
    error = refusal(text)
    assert f"a case or block ({column}) is not a patient" in error.what
    assert f'[patient_list] patient = "{column}"' in str(error.remedy)
    (line,) = table(text, patient=column).lines
    assert line.cells == {"slide": "a", "patient": "1"}


def test_more_fields_than_the_header_are_marked():
    found = table("slide;patient\na;1;\nb;2;x\nc\n")
    assert [line.surplus for line in found.lines] == [False, True, False]
    assert found.lines[2].cells == {"slide": "c", "patient": ""}


def test_a_role_that_does_not_exist_is_a_mistake():
    with pytest.raises(ValueError, match="roles must be among"):
        table("slide,patient\na,1\n", age="Age")


def test_headers_are_compared_by_letters_and_digits():
    assert header_key(" \uff30atient-ID (no.) ") == "patientidno"


def test_nothing_printed_shows_a_patient():
    found = table("slide,patient\na,MRN-SECRET\n")
    assert "SECRET" not in repr(found)
    assert "SECRET" not in repr(found.lines)
