import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.io.slide_files import (
    check_folders,
    file_state,
    fingerprint,
    fingerprint_key,
    labelled,
    opened_file,
    raw,
    shown,
    slide_names,
    under,
)
from pathfed_client.io.slide_listing import list_slides
from pathfed_common.errors import SiteDataError
from pathfed_common.privacy.randomness import KeyedRandom

KEY = bytes(range(32))


def put(path: Path, content=b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@given(st.binary(min_size=1, max_size=40).map(os.fsdecode))
def test_every_name_can_be_stored_and_leads_back_to_its_file(name):
    stored = shown(name)
    stored.encode("utf-8")
    assert raw(stored) == name
    assert stored.isprintable() or not name.isprintable()


@given(st.binary(min_size=1, max_size=8).map(os.fsdecode), st.binary(min_size=1, max_size=8).map(os.fsdecode))
def test_no_two_names_are_stored_alike(first, second):
    assert (shown(first) == shown(second)) == (first == second)


def test_one_folder_has_no_label_and_several_are_named_apart(tmp_path):
    first, second, third = tmp_path / "a" / "slides", tmp_path / "b" / "slides", tmp_path / "archive"
    assert labelled(first) == labelled([first]) == {"": first}
    assert labelled([first, second, third]) == {"slides": first, "slides~2": second, "archive": third}


@pytest.mark.parametrize("other", ["a", "a/b", ".", "link", "link/b"])
def test_folders_that_overlap_are_refused(tmp_path, other):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    check_folders([tmp_path / "a", tmp_path / "ab", tmp_path / "gone"])
    with pytest.raises(SiteDataError, match="PF217"):
        check_folders([tmp_path / "gone", tmp_path / "a", tmp_path / other])


def test_slide_may_be_named_by_path_or_file_name_and_a_series_by_any_file():
    assert slide_names("deep/a.svs", ()) == {"deep/a.svs", "a.svs"}
    assert slide_names("nas//deep/a.svs", ()) == {"nas//deep/a.svs", "deep/a.svs", "a.svs"}
    assert slide_names("case", ("case/1.dcm", "case/2.dcm")) == {"case", "case/1.dcm", "1.dcm", "case/2.dcm", "2.dcm"}
    assert slide_names("a.mrxs", ("a.mrxs", "a/Data0.dat")) == {"a.mrxs"}
    assert "a\\b.svs" in slide_names(shown("a\\b.svs"), ())


def test_slides_under_a_place_are_told_from_the_others():
    for path, place in (("a/b.svs", "a"), ("n//a/b.svs", "n//"), ("n//a/b.svs", "n//a"), ("a.svs", ""), ("a/b/c.svs", "a/b")):
        assert under(path, {place: 1}), (path, place)
    for path, place in (("ab/c.svs", "a"), ("m//a/b.svs", "n//"), ("n//a/b.svs", "a"), ("a.svs", "n//")):
        assert not under(path, {place: 1}), (path, place)


@pytest.mark.parametrize("where", [0, 500_000, 999_999])
def test_fingerprint_sees_beginning_middle_and_end(tmp_path, where):
    content = bytearray(1_000_000)
    path = put(tmp_path / "a.svs", content)
    before = fingerprint([path], KEY)
    content[where] = 1
    path.write_bytes(content)
    assert fingerprint([path], KEY) != before
    path.write_bytes(bytes(1_000_001))
    assert fingerprint([path], KEY) != before


def test_fingerprint_reads_samples_and_not_gigabytes(tmp_path):
    path = tmp_path / "a.svs"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert fingerprint([path], KEY)


def test_fingerprint_does_not_depend_on_names_and_order_but_on_the_key(tmp_path):
    files = [put(tmp_path / name, content) for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1"))]
    assert fingerprint(files[:2], KEY) == fingerprint([files[1], files[2]], KEY)
    assert fingerprint(files[:1], KEY) != fingerprint(files[:1], bytes(32))
    assert fingerprint(files[:1], KEY) != fingerprint([files[0], files[2]], KEY)


def test_fingerprints_have_a_key_of_their_own():
    derived = fingerprint_key(KEY)
    assert derived not in (KEY, fingerprint_key(bytes(32)))
    assert KeyedRandom(KEY, {"purpose": "slide-fingerprint"})._key != derived


def test_slide_is_found_again_by_its_stored_name(tmp_path, write_dicom):
    one, two = tmp_path / "x" / "nas", tmp_path / "y" / "nas"
    for name, series in (("own/1.dcm", "1"), ("own/2.dcm", "1"), ("mixed/1.dcm", "5"), ("mixed/2.dcm", "2"), ("3.dcm", "5")):
        write_dicom(one / name, series)
    put(two / "deep" / "a.svs")
    put(two / "m.mrxs")
    put(two / "m" / "Slidedat.ini")
    put(Path(os.fsdecode(os.fsencode(two) + b"/gr\xfcn\\1.svs")))
    slides = list_slides([one, two]).slides
    assert len(slides) == 6
    for slide in slides:
        assert opened_file([one, two], slide.path, slide.parts) == (slide.opened, slide.files)
        assert file_state(slide.files) == slide.state


def test_slide_that_is_gone_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_state(opened_file(tmp_path, "gone.svs")[1])
    with pytest.raises(FileNotFoundError):
        opened_file([tmp_path / "a", tmp_path / "b"], "gone.svs")
