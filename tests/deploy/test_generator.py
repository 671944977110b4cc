import csv
import hashlib
from pathlib import Path

import numpy as np
import openslide
import pytest

from pathfed_common.errors import HostError
from pathfed_local.generator import generate_hospitals, slide_bytes

SIDE_PX = (512, 640)


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.*"))}


def test_hospitals_have_slides_and_a_patient_list_that_names_each_once(tmp_path):
    calls = []
    hospitals = generate_hospitals(
        tmp_path, hospitals=2, patients=3, slides_per_patient=2, side_px=SIDE_PX, progress=lambda done, total: calls.append((done, total))
    )
    assert [hospital.name for hospital in hospitals] == ["hospital-a", "hospital-b"]
    assert calls == [(n, 12) for n in range(1, 13)]
    patients = set()
    for hospital in hospitals:
        with hospital.patient_list.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert sorted(row["slide"] for row in rows) == sorted(path.name for path in hospital.slides_folder.iterdir())
        assert (hospital.patients, hospital.slides, len(rows)) == (3, 6, 6)
        by_patient = [row["patient"] for row in rows]
        assert all(by_patient.count(name) == 2 for name in by_patient)
        patients |= set(by_patient)
    assert len(patients) == 6


def test_slides_are_pyramids_of_half_a_micrometre_a_pixel(tmp_path):
    (hospital,) = generate_hospitals(tmp_path, hospitals=1, patients=1, slides_per_patient=1, side_px=SIDE_PX)
    (path,) = hospital.slides_folder.iterdir()
    with openslide.OpenSlide(path) as slide:
        assert slide.level_downsamples == (1, 2, 4)
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        assert slide.properties["openslide.level[0].tile-width"] == "256"
        assert 512 <= min(slide.dimensions) <= max(slide.dimensions) <= 640


def test_equal_seeds_give_equal_files_whatever_the_number_of_patients(tmp_path):
    generate_hospitals(tmp_path / "one", hospitals=1, patients=1, slides_per_patient=2, seed=4, side_px=SIDE_PX)
    generate_hospitals(tmp_path / "more", hospitals=1, patients=2, slides_per_patient=2, seed=4, side_px=SIDE_PX)
    generate_hospitals(tmp_path / "other", hospitals=1, patients=1, slides_per_patient=2, seed=5, side_px=SIDE_PX)
    one, more, other = (digests(tmp_path / name / "hospital-a" / "slides") for name in ("one", "more", "other"))
    assert one.items() <= more.items()
    assert not set(one.values()) & set(other.values())


def test_colours_survive_the_file(tmp_path):
    pixels = np.empty((80, 80, 3), np.uint8)
    pixels[:] = (200, 80, 160)
    (tmp_path / "slide.tif").write_bytes(slide_bytes(pixels, mpp=0.25))
    with openslide.OpenSlide(tmp_path / "slide.tif") as slide:
        assert float(slide.properties["openslide.mpp-y"]) == 0.25
        seen = np.asarray(slide.read_region((0, 0), 0, (64, 64)))[..., :3]
    assert np.abs(seen.astype(int) - pixels[:64, :64]).max() <= 3


def test_folder_with_a_hospital_is_left_alone(tmp_path):
    generate_hospitals(tmp_path, hospitals=1, patients=1, slides_per_patient=1, side_px=SIDE_PX)
    before = digests(tmp_path)
    with pytest.raises(HostError, match="PF904"):
        generate_hospitals(tmp_path, hospitals=1, patients=1, slides_per_patient=1, seed=9, side_px=SIDE_PX)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("numbers", [{"hospitals": 0}, {"hospitals": 27}, {"patients": 0}, {"slides_per_patient": 0}, {"side_px": (9, 8)}])
def test_impossible_numbers_are_refused(tmp_path, numbers):
    with pytest.raises(ValueError, match="got"):
        generate_hospitals(tmp_path, **numbers)
    assert list(tmp_path.iterdir()) == []
