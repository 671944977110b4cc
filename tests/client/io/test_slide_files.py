import os
from pathlib import Path

import pytest

from pathfed_client.io.slide_files import SUFFIXES, file_state, find_slides, fingerprint, opened_file


def put(path: Path, content=b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_every_format_is_found_in_order_and_nothing_else(tmp_path):
    for suffix in SUFFIXES:
        put(tmp_path / f"z{suffix}")
    put(tmp_path / "deep" / "er" / "B.SVS")
    for other in ("notes.txt", "a.jpg", ".hidden.svs", ".trash/a.svs", "deep/patients.csv"):
        put(tmp_path / other)
    paths = [slide.path for slide in find_slides(tmp_path)]
    assert paths == sorted(["deep/er/B.SVS", *(f"z{suffix}" for suffix in SUFFIXES)])


def test_slide_may_be_named_by_path_or_file_name(tmp_path):
    put(tmp_path / "deep" / "a.svs")
    (slide,) = find_slides(tmp_path)
    assert slide.names == {"deep/a.svs", "a.svs"}
    assert slide.opened == tmp_path / "deep" / "a.svs"


def test_dicom_series_in_its_own_folder_is_one_slide_named_by_it(tmp_path, write_dicom):
    for name in ("1.dcm", "2.dcm", "3.DCM"):
        write_dicom(tmp_path / "case" / name, "1.2.3")
    (slide,) = find_slides(tmp_path)
    assert slide.path == "case"
    assert [path.name for path in slide.files] == ["1.dcm", "2.dcm", "3.DCM"]
    assert {"case", "1.dcm", "case/2.dcm"} <= slide.names


def test_several_series_in_one_folder_are_several_slides(tmp_path, write_dicom):
    for name, series in (("1.dcm", "1.2.3"), ("2.dcm", "1.2.9"), ("3.dcm", "1.2.3")):
        write_dicom(tmp_path / "mixed" / name, series)
    slides = find_slides(tmp_path)
    assert [(slide.path, len(slide.files)) for slide in slides] == [("mixed/1.dcm", 2), ("mixed/2.dcm", 1)]
    assert "3.dcm" in slides[0].names
    assert "mixed" not in slides[0].names | slides[1].names


def test_series_beside_other_slides_at_the_top_is_named_by_its_first_file(tmp_path, write_dicom):
    write_dicom(tmp_path / "1.dcm", "1.2.3")
    write_dicom(tmp_path / "2.dcm", "1.2.3")
    put(tmp_path / "a.svs")
    assert [slide.path for slide in find_slides(tmp_path)] == ["1.dcm", "a.svs"]


def test_dicom_files_whose_series_cannot_be_told_stand_alone(tmp_path):
    put(tmp_path / "case" / "1.dcm", b"nonsense")
    put(tmp_path / "case" / "2.dcm", b"nonsense")
    assert [slide.path for slide in find_slides(tmp_path)] == ["case/1.dcm", "case/2.dcm"]


def test_mirax_slide_changes_with_the_files_beside_it(tmp_path):
    put(tmp_path / "a.mrxs")
    data = put(tmp_path / "a" / "Data0001.dat", b"12345")
    (slide,) = find_slides(tmp_path)
    before = fingerprint(slide.files)
    assert file_state(slide.files).size == 6
    data.write_bytes(b"12346")
    assert fingerprint(slide.files) != before


@pytest.mark.parametrize("where", [0, 500_000, 999_999])
def test_fingerprint_sees_beginning_middle_and_end(tmp_path, where):
    content = bytearray(1_000_000)
    path = put(tmp_path / "a.svs", content)
    before = fingerprint([path])
    content[where] = 1
    path.write_bytes(content)
    assert fingerprint([path]) != before
    path.write_bytes(bytes(1_000_001))
    assert fingerprint([path]) != before


def test_slide_is_found_again_by_its_stored_path(tmp_path, write_dicom):
    for name, series in (("own/1.dcm", "1"), ("own/2.dcm", "1"), ("mixed/1.dcm", "1"), ("mixed/2.dcm", "2"), ("3.dcm", "1")):
        write_dicom(tmp_path / name, series)
    put(tmp_path / "deep" / "a.svs")
    put(tmp_path / "m.mrxs")
    put(tmp_path / "m" / "Slidedat.ini")
    slides = find_slides(tmp_path)
    assert len(slides) == 6
    for slide in slides:
        assert opened_file(tmp_path, slide.path) == (slide.opened, slide.files)


def test_slide_that_is_gone_is_an_os_error(tmp_path, write_dicom):
    write_dicom(tmp_path / "own" / "1.dcm", "1")
    for path in ("own", "own/9.dcm", "gone/1.dcm"):
        with pytest.raises(FileNotFoundError):
            opened_file(tmp_path, path)
    with pytest.raises(FileNotFoundError):
        file_state(opened_file(tmp_path, "gone.svs")[1])


def test_name_that_is_no_utf8_can_still_be_shown_and_stored(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.svs")).write_bytes(b"x")
    (slide,) = find_slides(tmp_path)
    assert slide.path == "gr\\xfcn.svs"
    assert slide.opened.exists()


def test_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_slides(tmp_path / "gone")
