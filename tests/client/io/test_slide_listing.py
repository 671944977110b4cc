import os
from pathlib import Path

import pytest

from pathfed_client.io import slide_listing
from pathfed_client.io.slide_files import SUFFIXES, UNREACHED, file_state
from pathfed_client.io.slide_listing import list_slides


def put(path: Path, content=b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def paths(*folders: Path) -> list[str]:
    return [slide.path for slide in list_slides(folders).slides]


def test_every_format_is_found_in_order_and_nothing_else(tmp_path):
    for suffix in SUFFIXES:
        put(tmp_path / f"z{suffix}")
    put(tmp_path / "deep" / "er" / "B.SVS")
    for other in ("notes.txt", "a.jpg", ".hidden.svs", ".trash/a.svs", "deep/patients.csv", "README", "data.1", "DICOMDIR"):
        put(tmp_path / other)
    (tmp_path / "folder.svs").mkdir()
    os.mkfifo(tmp_path / "pipe.svs")
    assert paths(tmp_path) == sorted(["deep/er/B.SVS", *(f"z{suffix}" for suffix in SUFFIXES)])


def test_state_is_that_of_all_files(tmp_path):
    put(tmp_path / "a.mrxs")
    put(tmp_path / "a" / "Data0001.dat", b"12345")
    put(tmp_path / "a" / "preview.tif")
    (slide,) = list_slides(tmp_path).slides
    assert slide.parts == ("a.mrxs", "a/Data0001.dat", "a/preview.tif")
    assert slide.state == file_state(slide.files)
    assert slide.state.size == 7


def test_folders_are_named_and_a_name_that_stands_in_both_is_no_guess(tmp_path):
    put(tmp_path / "x" / "a.svs")
    put(tmp_path / "y" / "a.svs")
    assert paths(tmp_path / "x", tmp_path / "y") == ["x//a.svs", "y//a.svs"]


@pytest.mark.parametrize("suffix", ["vms", "vmu"])
def test_hamamatsu_slide_is_made_of_the_files_it_names_but_for_the_macro_image(tmp_path, suffix):
    index = "[Virtual Microscope Specimen]\nImageFile=a.jpg\nImageFile(1,0)=a_1.tif\nMapFile=m.jpg\nMacroImage=macro.jpg\n"
    index += "ImageFile(2)=../x.jpg\n"
    put(tmp_path / f"s.{suffix}", index.encode())
    for name in ("a.jpg", "a_1.tif", "m.jpg", "macro.jpg"):
        put(tmp_path / name)
    (slide,) = list_slides(tmp_path).slides
    assert slide.parts == (f"s.{suffix}", "a.jpg", "a_1.tif", "m.jpg")
    assert slide.names == {f"s.{suffix}"}


def test_dicom_series_in_its_own_folder_is_one_slide_named_by_it(tmp_path, write_dicom):
    for name in ("1.dcm", "2.dcm", "3.DCM", "IM0004", "1.2.840.5"):
        write_dicom(tmp_path / "case" / name, "1.2.3")
    put(tmp_path / "case" / "notes")
    (slide,) = list_slides(tmp_path).slides
    assert slide.path == "case"
    assert sorted(path.name for path in slide.files) == ["1.2.840.5", "1.dcm", "2.dcm", "3.DCM", "IM0004"]
    assert {"case", "1.dcm", "case/2.dcm", "IM0004"} <= slide.names


def test_several_series_in_one_folder_are_several_slides(tmp_path, write_dicom):
    for name, series in (("1.dcm", "1.2.3"), ("2.dcm", "1.2.9"), ("3.dcm", "1.2.3")):
        write_dicom(tmp_path / "mixed" / name, series)
    slides = list_slides(tmp_path).slides
    assert [(slide.path, len(slide.files)) for slide in slides] == [("mixed/1.dcm", 2), ("mixed/2.dcm", 1)]
    assert "3.dcm" in slides[0].names
    assert "mixed" not in slides[0].names | slides[1].names


def test_study_whose_series_are_spread_over_folders_is_a_slide_a_series(tmp_path, write_dicom):
    for name, series in (("study/s1/a/1.dcm", "7"), ("study/s1/b/2.dcm", "7"), ("study/s2/1.dcm", "8"), ("study/s3/2.dcm", "8")):
        write_dicom(tmp_path / name, series)
    assert [(slide.path, slide.parts) for slide in list_slides(tmp_path).slides] == [
        ("study/s1", ("study/s1/a/1.dcm", "study/s1/b/2.dcm")),
        ("study/s2/1.dcm", ("study/s2/1.dcm", "study/s3/2.dcm")),
    ]


def test_series_beside_other_slides_at_the_top_is_named_by_its_first_file(tmp_path, write_dicom):
    write_dicom(tmp_path / "1.dcm", "1.2.3")
    write_dicom(tmp_path / "2.dcm", "1.2.3")
    put(tmp_path / "a.svs")
    assert paths(tmp_path) == ["1.dcm", "a.svs"]


def test_dicom_files_whose_series_cannot_be_told_stand_alone(tmp_path):
    put(tmp_path / "case" / "1.dcm", b"nonsense")
    put(tmp_path / "case" / "2.dcm", b"nonsense")
    assert paths(tmp_path) == ["case/1.dcm", "case/2.dcm"]


def test_heads_of_dicom_files_are_read_once(tmp_path, write_dicom, monkeypatch):
    write_dicom(tmp_path / "1.dcm", "1")
    heads: slide_listing.Heads = {}
    list_slides(tmp_path, heads)
    monkeypatch.setattr(slide_listing, "_series_of", lambda path: pytest.fail("read again"))
    assert list_slides(tmp_path, heads).slides[0].path == "1.dcm"


def test_loops_of_links_end_and_real_folders_name_their_slides(tmp_path):
    put(tmp_path / "real" / "a.svs")
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "self.svs").symlink_to(tmp_path / "self.svs")
    (tmp_path / "dangling.svs").symlink_to(tmp_path / "nowhere.svs")
    put(tmp_path.parent / f"{tmp_path.name}-elsewhere" / "b.svs")
    (tmp_path / "shared").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    assert paths(tmp_path) == ["real/a.svs", "shared/b.svs"]


def test_folder_that_cannot_be_listed_is_told_and_the_rest_is_listed(tmp_path, monkeypatch):
    put(tmp_path / "a.svs")
    put(tmp_path / "deep" / "stale" / "b.svs")
    real = os.scandir

    def scandir(place):
        if Path(place).name == "stale":
            raise OSError(116, "Stale file handle")
        return real(place)

    monkeypatch.setattr("os.scandir", scandir)
    listing = list_slides(tmp_path)
    assert [slide.path for slide in listing.slides] == ["a.svs"]
    assert listing.unlisted == {"deep/stale": "Stale file handle"}
    assert list_slides([tmp_path / "gone", tmp_path / "deep"]).unlisted.keys() == {"gone//", "deep//stale"}
    assert list_slides(tmp_path / "gone").unlisted.keys() == {""}


def test_file_that_cannot_be_reached_stays_in_the_listing(tmp_path, monkeypatch):
    put(tmp_path / "a.mrxs")
    monkeypatch.setattr(slide_listing, "joint_state", lambda states: (_ for _ in ()).throw(OSError(5, "I/O error")))
    (slide,) = list_slides(tmp_path).slides
    assert (slide.path, slide.state) == ("a.mrxs", UNREACHED)


def test_ten_thousand_files_are_listed_with_one_look_each(tmp_path, monkeypatch):
    for number in range(10_000):
        folder = tmp_path / f"{number % 50:02d}"
        if number < 50:
            folder.mkdir()
        (folder / f"{number}.svs").touch()
    looks = []
    real = slide_listing._state

    def look(entry):
        looks.append(entry.name)
        return real(entry)

    monkeypatch.setattr(slide_listing, "_state", look)
    assert len(list_slides(tmp_path).slides) == 10_000
    assert len(looks) == 10_000
