"""Folders, list, keys and speed of real folders, some of them damaged."""

import os
from pathlib import Path

import pytest

from pathfed_client.io.doctor.looking import free_bytes, look_at_folders, look_at_keys, look_at_list, measure_speed
from pathfed_client.io.doctor.slides import Look, LookTask, look_at
from pathfed_client.io.slide_listing import list_slides
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan(tile_px=224)


def test_folders_that_are_away_are_counted_and_the_others_listed(tmp_path, write_slide):
    write_slide(tmp_path / "one" / "deep" / "a.tif")
    seen, slides = look_at_folders([tmp_path / "one", tmp_path / "two"])
    assert (seen.folders, seen.away, seen.slides, seen.unlisted) == (2, 1, 1, ("two//",))
    assert [slide.path for slide in slides] == ["one//deep/a.tif"]
    alone, none = look_at_folders(tmp_path / "two")
    assert (alone.folders, alone.away, alone.slides, none) == (1, 1, 0, ())


def test_a_folder_below_that_cannot_be_listed_is_no_folder_away(tmp_path, write_slide, monkeypatch):
    write_slide(tmp_path / "a.tif")
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def scandir(place):
        if Path(place).name == "locked":  # root may list everything, so the refusal is planted
            raise PermissionError(13, "Permission denied")
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    seen, slides = look_at_folders(tmp_path)
    assert (seen.away, seen.unlisted, len(slides)) == (0, ("locked",), 1)


def test_folders_inside_each_other_are_not_listed(tmp_path, write_slide):
    write_slide(tmp_path / "in" / "a.tif")
    seen, slides = look_at_folders([tmp_path, tmp_path / "in"])
    assert (seen.overlap, seen.folders, slides) == (True, 2, ())


def test_the_list_is_laid_against_the_slides(tmp_path, write_slide):
    for name in ("a.tif", "b.tif", "x/c.tif", "y/c.tif"):
        write_slide(tmp_path / "slides" / name)
    listed = tmp_path / "list.csv"
    listed.write_text("slide,patient\na.tif,P1\ngone.tif,P2\nc.tif,P3\n")
    seen, mapped = look_at_list(listed, list_slides(tmp_path / "slides").slides, {})
    assert (seen.slides, seen.mapped, seen.missing, seen.ambiguous, seen.code) == (4, 1, 1, 1, None)
    assert seen.unmapped == ("b.tif", "x/c.tif", "y/c.tif")
    assert [slide.path for slide in mapped] == ["a.tif"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, "PF202"),
        ("", "PF202"),
        ("weather,person\na.tif,P1\n", "PF202"),
    ],
    ids=["gone", "empty", "other columns"],
)
def test_a_list_that_cannot_be_used_is_a_code(tmp_path, write_slide, text, code):
    write_slide(tmp_path / "slides" / "a.tif")
    if text is not None:
        (tmp_path / "list.csv").write_text(text)
    seen, mapped = look_at_list(tmp_path / "list.csv", list_slides(tmp_path / "slides").slides, {})
    assert (seen.code, seen.slides, seen.mapped, mapped) == (code, 1, 0, ())


@pytest.mark.parametrize(("lines", "code"), [("a.tif,\n", "PF232"), ("a.tif,P1\na.tif,P2\n", "PF203")], ids=["no patient", "two patients"])
def test_lines_in_doubt_are_counted_by_code_and_their_slide_is_out(tmp_path, write_slide, lines, code):
    for name in ("a.tif", "b.tif"):
        write_slide(tmp_path / "slides" / name)
    (tmp_path / "list.csv").write_text("slide,patient\nb.tif,P9\n" + lines)
    seen, mapped = look_at_list(tmp_path / "list.csv", list_slides(tmp_path / "slides").slides, {})
    assert (seen.code, seen.doubts) == (None, (code,))
    assert [slide.path for slide in mapped] == ["b.tif"]


def test_keys_are_looked_at_with_their_folders(tmp_path):
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for name, mode in (("good", 0o600), ("open", 0o640)):
        (keys / name).touch()
        (keys / name).chmod(mode)
    seen = {key.name: (key.there, key.exposed) for key in look_at_keys(tmp_path, ["keys", "secrets"], ["keys/good", "keys/gone"])}
    assert seen == {
        "keys": (True, False),
        "keys/good": (True, False),
        "keys/gone": (False, False),
        "keys/open": (True, True),
        "secrets": (False, False),
    }
    keys.chmod(0o755)
    assert [key.name for key in look_at_keys(tmp_path, ["keys"], []) if key.exposed] == ["keys", "keys/open"]


def test_free_bytes_are_those_of_that_disk(small_disk):
    assert 0 < free_bytes(small_disk) <= 1 << 20
    (small_disk / "full").write_bytes(bytes(600_000))
    assert free_bytes(small_disk) < 500_000


@pytest.fixture
def looks(tmp_path, write_slide) -> list[Look]:
    for number, name in enumerate("ab"):
        write_slide(tmp_path / "slides" / f"{name}.tif", shift=number)
    return [look_at(LookTask(slide, PLAN, 0)) for slide in list_slides(tmp_path / "slides").slides]


@pytest.mark.parametrize("workers", [1, 2])
def test_speed_is_measured_with_the_real_workers(looks, tmp_path, workers):
    seen = measure_speed(tmp_path / "slides", looks, tile_px=224, tiles_per_slide=4, workers=workers, seconds=0)
    assert seen is not None
    assert (seen.slides, seen.tiles, seen.failed, seen.workers) == (2, 16 * workers, 0, workers)
    assert seen.rate > 0


def test_tiles_that_are_gone_by_then_are_counted_as_failed(looks, tmp_path):
    (tmp_path / "slides" / "a.tif").unlink()
    seen = measure_speed(tmp_path / "slides", looks, tile_px=224, tiles_per_slide=4, workers=1, seconds=0)
    assert seen is not None
    assert (seen.tiles, seen.failed) == (8, 8)


def test_no_slide_with_tiles_means_no_speed(tmp_path):
    assert measure_speed(tmp_path, [], tile_px=224, tiles_per_slide=4, workers=1, seconds=0) is None
