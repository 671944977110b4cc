"""A list laid against a folder: what a scan acts on, and the error it ends with."""

import pytest

from pathfed_client.cohort.patient_list import pseudonym
from pathfed_client.cohort.withdrawal import Withdrawn, WithdrawnKind, of_slide
from pathfed_client.io.listing import WITHDRAWN, Placed, preview, read_listing
from pathfed_client.io.slide_listing import list_slides
from pathfed_common.errors import ErrorCode, SiteDataError

KEY = bytes(range(32))


@pytest.fixture
def lay(tmp_path, write_dicom):
    """Lay lines against a folder with a.svs, x/b.svs and a DICOM series; none of them is a slide that would open."""
    folder = tmp_path / "slides"
    (folder / "x").mkdir(parents=True)
    for name in ("a.svs", "x/b.svs"):
        (folder / name).write_bytes(b"never opened")
    for name in ("1.dcm", "2.dcm"):
        write_dicom(folder / "series" / name, "1.2.3")
    slides = list_slides(folder).names

    def read(*lines: str, header: str = "slide,patient,organ,mpp"):
        path = tmp_path / "p.csv"
        path.write_text("\n".join([header, *lines]))
        return read_listing(path, slides), slides

    return read


def test_certain_slides_are_placed_with_pseudonym_attributes_and_resolution(lay):
    listing, _ = lay("a,P1,Lung,0.25", "b,P2,,", "series,P1,,")
    slides, out = listing.placed(KEY, ())
    assert slides == {
        "a.svs": Placed(pseudonym(KEY, "P1"), {"organ": "lung", "mpp": "0.25"}, 0.25),
        "x/b.svs": Placed(pseudonym(KEY, "P2"), {}, None),
        "series": Placed(pseudonym(KEY, "P1"), {}, None),
    }
    assert out == {}
    assert listing.error is None
    assert listing.lines_by_patient(KEY) == {pseudonym(KEY, "P1"): (2, 4), pseudonym(KEY, "P2"): (3,)}


def test_withdrawn_patients_and_slides_are_out(lay):
    listing, _ = lay("a,P1,,", "b,P2,,", "series,P3,,")
    withdrawn = {Withdrawn(WithdrawnKind.PATIENT, pseudonym(KEY, "P1")), *of_slide(KEY, "series", None)}
    slides, out = listing.placed(KEY, frozenset(withdrawn))
    assert list(slides) == ["x/b.svs"]
    assert out == {"a.svs": WITHDRAWN, "series": WITHDRAWN}


@pytest.mark.parametrize(
    ("lines", "code", "where"),
    [
        (("a,P1,,", "a,P2,,"), ErrorCode.SLIDE_LISTED_TWICE, "lines 2 and 3"),
        (("a,P1,,", "a,P2,,", "a.svs,P3,,"), ErrorCode.SLIDE_LISTED_TWICE, "lines 2, 3 and 4"),
        (("a,P1,x,", "a,P1,y,", "b,,,"), ErrorCode.SLIDE_LINES_CONFLICT, "lines 2 and 3"),
        (("b,,,", "a,P1,,9"), ErrorCode.LIST_LINE_UNUSABLE, "line 2"),
        (("b,,,", "a,P1,x,", "a,P1,y,", "series,P1,,", "series,P2,,"), ErrorCode.SLIDE_LISTED_TWICE, "lines 5 and 6"),
        (("gone,,,", "a,P1,,"), ErrorCode.LIST_LINE_UNUSABLE, "line 2"),
    ],
)
def test_the_gravest_finding_is_the_error_and_each_is_listed_once(lay, lines, code, where):
    listing, _ = lay(*lines)
    error = listing.error
    assert error is not None
    assert error.code is code
    assert str(error.where).endswith(where)
    assert len(set(listing.findings)) == len(listing.findings)
    assert not any(patient in str(error) for patient in ("P1", "P2", "P3"))


def test_lines_without_a_slide_are_no_error(lay):
    listing, slides = lay("gone,P1,,", "a,P1,,")
    assert listing.error is None
    shown = preview(listing, slides, KEY)
    assert [(one.slide, one.line, one.code) for one in shown.not_found] == [("gone", 2, ErrorCode.SLIDE_MISSING)]
    assert (shown.mapped, shown.patients, shown.unmapped) == (1, 1, ("series", "x/b.svs"))


def test_a_preview_names_no_patient(lay):
    listing, slides = lay("a,MRN-SECRET,lung,", "b,,,", "gone,MRN-SECRET,,")
    assert "SECRET" not in repr(preview(listing, slides, KEY)) + repr(listing.findings)


def test_a_list_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SiteDataError, match="PF202"):
        read_listing(tmp_path / "none.csv", {})
