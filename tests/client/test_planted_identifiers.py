"""Nothing that names a patient, a slide, a place or a person leaves a site: planted everywhere, searched for in everything that leaves."""

import base64
import io
import json
import logging
import os
import shutil
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answering_site import LocalBulk, bytes_of
from planted import DICOM_OTHERS, DICOM_TEXTS, add_label, dicom_mark, found_in, mark, plant_dicom, plant_list, planted_tiff, planted_words

from pathfed_client import app, deciding
from pathfed_client.answering import SiteAnswerer
from pathfed_client.home import SiteHome
from pathfed_client.io.site_records import SlideStatus
from pathfed_client.io.site_store import SiteStore
from pathfed_client.slides.tiling import scan_key
from pathfed_common.provenance.documents import Approval
from pathfed_common.synthetic import draw_anatomy, draw_stain, paint

OFFERED_AT = 1_000_000.0
PATIENTS = 6


@dataclass(frozen=True)
class Planted:
    """A hospital full of identifiers, and all of them."""

    world: Any
    home: SiteHome
    words: frozenset[str]


def _fill(slides: Path, real: Path | None) -> list[tuple[str, str]]:
    """Slides with identifiers inside, in their names and in their folders' names; and their patients."""
    rows = []
    for number in range(PATIENTS):
        random = np.random.default_rng(number)
        pixels = paint(256, 256, random, draw_stain(random, 0), draw_anatomy(random), glass=False)
        relative = f"{mark('Folder', number)}/{mark('File', number)}.{'svs' if number % 2 else 'tif'}"
        (slides / relative).parent.mkdir(parents=True)
        (slides / relative).write_bytes(planted_tiff(pixels, aperio=bool(number % 2)))
        if number % 2:
            add_label(slides / relative)
        rows.append((relative, mark("Patient", number)))
    (slides / f"{mark('Broken')}.svs").write_bytes(mark("Content").encode() * 50)
    rows.append((f"{mark('Broken')}.svs", mark("PatientBroken")))
    if real is not None:
        target = Path(shutil.copytree(real, slides / mark("Series"), copy_function=shutil.copyfile))
        for file in target.iterdir():
            plant_dicom(file)
        rows.append((mark("Series"), mark("PatientDicom")))
    return rows


def _words(root: Path) -> frozenset[str]:
    words = {mark(field) for field in ("Broken", "Content", "PatientBroken", "Series", "PatientDicom", "Home", "Hospital")}
    words |= {mark(field, number) for field in ("Folder", "File", "Patient") for number in range(PATIENTS)} | planted_words()
    words |= {mark(f"{name}Pixels") for name in ("Label", "Macro")} | {mark(f"{name}Text") for name in ("label", "macro")}
    words |= {dicom_mark(name) for name in DICOM_TEXTS} | set(DICOM_OTHERS.values())
    return frozenset(words | {str(root)})


@pytest.fixture(scope="module")
def hospital(world, tmp_path_factory) -> Planted:
    root = tmp_path_factory.mktemp("planted") / mark("Hospital")
    root.mkdir()
    data = Path(os.environ.get("PATHFED_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "slides" / "ok" / "dicom_CMU"
    plant_list(root / "patients.csv", _fill(root / "slides", data if data.is_dir() else None))
    for file in (world.card, world.signed_plan):
        shutil.copy(file, root)
    there = replace(world, root=root)
    return Planted(there, there.init(root / mark("Home"), reply_slots=False), _words(root))


@pytest.fixture(scope="module")
def left(hospital) -> dict[str, bytes]:
    """All that left the site by a scan, an approval and two answered rounds, and what was logged at INFO and above meanwhile."""
    world, home = hospital.world, hospital.home
    log, root, bulk = io.StringIO(), logging.getLogger(), LocalBulk(home)
    handler, level = logging.StreamHandler(log), root.level
    handler.setLevel(logging.INFO)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    sent = {"site card": home.card_file.read_bytes()}
    try:
        app.scan(home, world.plan.cohort, lambda done, total: None)
        deciding.approve(home, world.signed_plan, 4, home.root / "approval.dsse")
        sent["approval"] = (home.root / "approval.dsse").read_bytes()
        with (
            closing(SiteStore(home.database)) as store,
            closing(SiteAnswerer(home, store, lambda outlet: bulk, now=lambda: OFFERED_AT + 1.5, sleep=lambda seconds: None)) as answerer,
        ):
            bulk.holds = world.base_state
            for index in (1, 2):
                answer = answerer(world.offer(round_index=index))
                assert answer.code is None, answer.code
                assert answer.statement is not None
                sent |= {f"statement {index}": answer.statement, "update": bytes_of(answer)}
            refused = answerer(b"{}")
            sent["refusal"] = repr(refused).encode()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    sent["log"] = log.getvalue().encode()
    return sent


def leaks(sent: dict[str, bytes], words: frozenset[str]) -> dict[str, set[str]]:
    """What was found in what; envelopes are looked into as well."""
    found = {}
    for what, data in sent.items():
        inner = base64.b64decode(json.loads(data)["payload"]) if data.startswith(b"{") else b""
        hits = found_in(data, words) | found_in(inner, words)
        if hits:
            found[what] = hits
    return found


def test_nothing_that_leaves_the_site_holds_a_planted_identifier(hospital, left):
    assert {"site card", "approval", "statement 1", "statement 2", "update", "log"} <= left.keys()
    assert b"round 2" in left["log"]
    assert leaks(left, hospital.words) == {}


def test_every_slide_with_identifiers_was_really_read(hospital, left):
    """Else there would have been nothing to leak."""
    with closing(SiteStore(hospital.home.database)) as store:
        records = store.slides(scan_key(hospital.world.plan.cohort)).values()
    used = [record.path for record in records if record.status is SlideStatus.USABLE]
    assert len(used) >= PATIENTS
    assert len(records) - len(used) == 1, "the broken one"
    inside = b"".join(path.read_bytes() for path in hospital.world.slides.rglob("*") if path.is_file())
    inside += hospital.world.patients.read_bytes()
    names = "\n".join(str(path) for path in hospital.world.slides.rglob("*")).encode() + str(hospital.home.root).encode()
    missing = hospital.words - found_in(inside + names, hospital.words)
    dicom = {dicom_mark(name) for name in DICOM_TEXTS} | set(DICOM_OTHERS.values()) | {mark("Series"), mark("PatientDicom")}
    assert missing <= (set() if (hospital.world.slides / mark("Series")).exists() else dicom)


def test_the_database_holds_no_patient_identifier_and_nothing_from_inside_a_slide(hospital, left):
    stored = b"".join(path.read_bytes() for path in hospital.home.root.glob("site.db*"))
    held = found_in(stored, hospital.words)
    names = ("Folder", "File", "Broken", "Series", "Home", "Hospital")
    attributes = ("ColumnOrgan", "ColumnBlock")  # kept at the site, for the plan's cohort rules
    assert {word for word in held if not any(kind in word for kind in (*names, *attributes))} == set()
    assert mark("File", 0) in held, "the search finds what is there"
    assert mark("PatientBroken") not in held


@pytest.mark.parametrize("words", [(mark("Patient", 1),), (mark("File", 0),)])
def test_the_search_finds_every_form(words):
    text = words[0].encode()
    coded = [base64.b64encode(b"x" * shift + text + b"yz") for shift in range(3)]
    forms = [text, text.upper(), words[0].encode("utf-16-le"), words[0].encode("utf-16-be"), text.hex().encode(), *coded]
    for form in forms:
        assert found_in(b"before" + form + b"after", words) == set(words), form
    assert found_in(b"nothing of the kind", words) == set()


@pytest.mark.parametrize("leak", ["home", "slides", "patient"])
def test_a_planted_leak_is_found(hospital, left, monkeypatch, leak, tmp_path):
    """An approval that says more than it should."""
    told = {"home": str(hospital.home.root), "slides": str(hospital.world.slides), "patient": mark("Patient", 2)}[leak]
    real = Approval.to_bytes

    def careless(self, key):
        envelope = json.loads(real(self, key))
        said = json.loads(base64.b64decode(envelope["payload"])) | {"note": told}
        return json.dumps(envelope | {"payload": base64.b64encode(json.dumps(said).encode()).decode()}).encode()

    monkeypatch.setattr(Approval, "to_bytes", careless)
    monkeypatch.setattr(deciding, "_standing", lambda *_: None)  # the hospital has approved the plan already
    home = SiteHome(shutil.copytree(hospital.home.root, tmp_path / "home"))
    deciding.approve(home, hospital.world.signed_plan, 3, tmp_path / "approval.dsse")
    assert leaks({"approval": (tmp_path / "approval.dsse").read_bytes()}, hospital.words)
