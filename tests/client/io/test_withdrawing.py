"""Withdrawals: whole or not at all, at once, for good, and by names that tell nothing."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pathfed_client.cohort.patient_list import pseudonym
from pathfed_client.cohort.withdrawal import WithdrawnKind
from pathfed_client.io import site_cohort
from pathfed_client.io.scan import scan
from pathfed_client.io.site_records import SealedUpdate, SlideStatus, WithdrawnMeanwhileError
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.withdrawing import KnownHere, WithdrawalInput, WithdrawReport, withdraw
from pathfed_client.slides.tiling import scan_key
from pathfed_common import digest
from pathfed_common.errors import ErrorCode, HostError, SiteDataError
from pathfed_common.ids import run_name
from pathfed_common.plan import CohortPlan

PLAN = CohortPlan(tile_px=224)
KEY = bytes(range(32))


class Site:
    """Three slides of two patients, scanned."""

    def __init__(self, home: Path, write_slide) -> None:
        self.folder, self.list, self.write_slide = home / "slides", home / "patients.csv", write_slide
        self.store = SiteStore(home / "site.db")
        for number, name in enumerate(("a.tif", "b.tif", "deep/c.tif")):
            write_slide(self.folder / name, shift=11 * number)
        self.map("a.tif,P1", "b.tif,P2", "c.tif,P1")
        self.scan()

    def map(self, *lines: str) -> None:
        self.list.write_text("\n".join(["slide,patient", *lines]))

    def scan(self, plan=PLAN):
        return scan(self.store, self.folder, self.list, plan, KEY, now=7.0)

    def withdraw(self, *, patients: str | bytes | None = None, slides: str | None = None, listed=(), names=None) -> WithdrawReport:
        def given(text: str | bytes | None) -> WithdrawalInput | None:
            return None if text is None else WithdrawalInput(text if isinstance(text, bytes) else text.encode(), "given")

        known = KnownHere(lambda: listed, lambda: names or {})
        return withdraw(self.store, KEY, known, patients=given(patients), slides=given(slides), now=8.0)

    def tiles(self, plan=PLAN) -> dict[str, int]:
        """Tiles of each patient that would be drawn from now."""
        made = site_cohort.cohort(self.store, plan, KEY, self.store.withdrawn())
        names = {pseudonym(KEY, name): name for name in ("P1", "P2", "P9")}
        return {names[patient.pseudonym]: patient.tile_count for patient in made.patients}


@pytest.fixture
def site(tmp_path, write_slide):
    made = Site(tmp_path, write_slide)
    yield made
    made.store.close()


def test_a_withdrawn_patient_is_out_at_once_under_every_plan(site):
    other = CohortPlan(tile_px=96)
    site.scan(other)
    assert site.tiles() == {"P1": 12, "P2": 6}
    assert site.withdraw(patients=" p1 \n\n") == WithdrawReport(patients=1, slides=2, new=True)
    assert site.tiles() == {"P2": 6}
    assert list(site.tiles(other)) == ["P2"]
    assert {record.reason for record in site.store.slides(scan_key(PLAN)).values()} == {None, ErrorCode.SLIDE_WITHDRAWN}
    assert [len(site.store.cohort(scan_key(plan)).patients) for plan in (PLAN, other)] == [1, 1], "even where nobody asks who was withdrawn"


def test_a_withdrawn_patient_stays_out_over_later_scans_and_lists(site):
    site.withdraw(patients="P1")
    report = site.scan()
    assert {one.path: one.reason for one in report.slides} == {
        "a.tif": ErrorCode.SLIDE_WITHDRAWN,
        "b.tif": None,
        "deep/c.tif": ErrorCode.SLIDE_WITHDRAWN,
    }
    assert report.slides_read == 0
    site.write_slide(site.folder / "new.tif", shift=77)
    site.map("a.tif,P9", "b.tif,P2", "c.tif,P1", "new.tif,p1")
    report = site.scan()
    assert report.slides_read == 0, "neither the new slide nor the one that another number claims now"
    assert site.tiles() == {"P2": 6}
    (site.folder / "a.tif").rename(site.folder / "renamed.tif")
    site.map("renamed.tif,P9", "b.tif,P2")
    site.scan()
    assert site.tiles() == {"P2": 6}, "its contents are known again"
    site.write_slide(site.folder / "a.tif", shift=333)
    site.map("a.tif,P9", "b.tif,P2")
    site.scan()
    assert site.tiles() == {"P2": 6}, "what takes its place stays out"


@pytest.mark.parametrize("name", ["deep/c.tif", "c.tif", "c", "deep\\c.tif"])
def test_a_withdrawn_slide_leaves_its_patient_the_others(site, name):
    assert site.withdraw(slides=name) == WithdrawReport(patients=0, slides=1, new=True)
    assert site.tiles() == {"P1": 6, "P2": 6}
    assert site.scan().by_reason == {ErrorCode.SLIDE_WITHDRAWN: 1}
    assert site.tiles() == {"P1": 6, "P2": 6}


def test_a_slide_listed_by_mistake_for_a_withdrawn_patient_is_read_once_the_list_is_right(site):
    site.withdraw(patients="P1")
    site.write_slide(site.folder / "new.tif", shift=77)
    site.map("a.tif,P1", "b.tif,P2", "c.tif,P1", "new.tif,P1")
    assert site.scan().slides_read == 0
    site.map("a.tif,P1", "b.tif,P2", "c.tif,P1", "new.tif,P9")
    assert site.scan().slides_read == 1
    assert site.tiles() == {"P2": 6, "P9": 6}


def test_copies_of_a_withdrawn_slide_are_out_with_it(site):
    (site.folder / "copy.tif").write_bytes((site.folder / "a.tif").read_bytes())
    site.map("a.tif,P1", "b.tif,P2", "c.tif,P1", "copy.tif,P1")
    site.scan()
    site.withdraw(slides="a.tif")
    assert site.tiles() == {"P1": 6, "P2": 6}
    site.map("a.tif,P1", "b.tif,P2", "c.tif,P1", "copy.tif,P9")
    site.scan()
    assert site.tiles() == {"P1": 6, "P2": 6}


def test_a_scan_under_way_cannot_bring_a_withdrawn_slide_back(site):
    """It read the withdrawals before this one, and writes the row after it."""
    before = dict(site.store.slides(scan_key(PLAN)))
    site.withdraw(slides="a.tif", patients="P2")
    for number, record in before.items():
        site.store.set_slide_state(number, status=SlideStatus.USABLE, patient=record.patient)
    assert site.tiles() == {"P1": 6}


def test_the_same_again_is_no_error_and_changes_nothing(site):
    site.withdraw(patients="P1", slides="a.tif")
    names = site.store.withdrawn()
    assert site.withdraw(patients="P1", slides="a.tif") == WithdrawReport(patients=1, slides=2, new=False)
    site.scan()
    assert not site.withdraw(patients="P1").new
    assert site.store.withdrawn() == names


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ({"patients": "P1\nP7\n\nP8"}, "lines 2, 4"),
        ({"slides": "a.tif\nA.tif"}, "lines 2"),
        ({"slides": "deep"}, "lines 1"),
        ({"patients": "P1", "slides": "gone.tif"}, "lines 1"),
        ({"patients": "gone", "slides": "a.tif"}, "lines 1"),
        ({"patients": "\n".join(f"X{n}" for n in range(30))}, ", 20 and 10 more"),
    ],
)
def test_one_unknown_line_refuses_all_with_the_lines_and_no_identifier(site, given, lines):
    with pytest.raises(SiteDataError) as caught:
        site.withdraw(**given)
    assert caught.value.code is ErrorCode.WITHDRAWAL_UNKNOWN
    assert lines in str(caught.value.value)
    assert not any(word in str(caught.value) for word in ("P7", "A.tif", "gone"))
    assert site.store.withdrawn() == frozenset()
    assert site.tiles() == {"P1": 12, "P2": 6}
    assert site.store.events()[-1].kind == "scan"


@pytest.mark.parametrize("data", ["", " \n\n", "\ufeff\n"])
def test_nothing_to_withdraw_is_an_error(site, data):
    with pytest.raises(SiteDataError, match=r"PF235.*no identifier"):
        site.withdraw(patients=data)


def test_a_name_of_several_slides_is_refused(site):
    site.write_slide(site.folder / "x" / "a.tif", shift=5)
    names = {"a.tif": {"a.tif"}, "x/a.tif": {"x/a.tif", "a.tif"}}
    assert site.withdraw(slides="a.tif", names=names).slides == 1, "the whole path of one"
    with pytest.raises(SiteDataError, match="PF235"):
        site.withdraw(slides="a", names=names)


def test_patients_and_slides_that_were_never_scanned_can_be_withdrawn_ahead(site):
    names = {"later.tif": {"later.tif"}}
    done = site.withdraw(patients="P9", slides="later", listed={pseudonym(KEY, "P9")}, names=names)
    assert (done.patients, done.slides) == (1, 1)
    site.write_slide(site.folder / "later.tif", shift=50)
    site.write_slide(site.folder / "nine.tif", shift=60)
    site.map("a.tif,P1", "b.tif,P2", "c.tif,P1", "later.tif,P2", "nine.tif,P9")
    assert site.scan().slides_read == 0
    assert site.tiles() == {"P1": 12, "P2": 6}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_identifiers_are_read_in_the_encodings_of_lists(site, encoding):
    site.map("a.tif,M\xfcller", "b.tif,P2")
    site.scan()
    assert site.withdraw(patients="M\xfcller\r\n".encode(encoding)).patients == 1


def test_what_is_kept_holds_pseudonyms_and_counts_and_no_identifier(site):
    site.map("a.tif,MRN-SECRET", "b.tif,P2")
    site.scan()
    site.withdraw(patients="MRN-SECRET", slides="b.tif")
    event = site.store.events()[-1]
    assert (event.kind, event.detail) == ("withdraw", f"1 patients, 2 slides: {pseudonym(KEY, 'MRN-SECRET')}")
    with closing(sqlite3.connect(site.store.path)) as database:
        kept = database.execute("SELECT kind, name FROM withdrawal").fetchall()
    assert sorted(kind for kind, _ in kept) == ["contents", "contents", "path", "path", "patient"]
    assert not any("tif" in name or "SECRET" in name for _, name in kept)


@pytest.mark.parametrize("statement", ["DELETE FROM withdrawal", "UPDATE withdrawal SET name = 'x'"])
def test_a_withdrawal_cannot_be_taken_back(site, statement):
    site.withdraw(patients="P1")
    with closing(sqlite3.connect(site.store.path)) as database, pytest.raises(sqlite3.IntegrityError, match="for good"):
        database.execute(statement)
    assert {one.kind for one in site.store.withdrawn()} == set(WithdrawnKind)


def test_an_answer_is_sealed_only_if_nothing_was_withdrawn_since(site):
    sealed = SealedUpdate(run=run_name("r"), round_index=1, statement=b"s", update_path="u", update=digest.of_bytes(b""), at=1.0)
    before = len(site.store.withdrawn())
    site.withdraw(patients="P1")
    with pytest.raises(WithdrawnMeanwhileError):
        site.store.put_sealed(sealed, withdrawn=before)
    assert site.store.get_sealed("r", 1) is None
    site.store.put_sealed(sealed, withdrawn=len(site.store.withdrawn()))
    site.withdraw(patients="P2")
    site.store.put_sealed(sealed, withdrawn=before)  # sealed before: the same again changes nothing
    assert site.store.get_sealed("r", 1) == sealed


def test_a_failing_withdrawal_does_nothing(site):
    with closing(sqlite3.connect(site.store.path)) as database, database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON event BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(HostError):
        site.withdraw(patients="P1")
    assert site.store.withdrawn() == frozenset()
    assert site.tiles() == {"P1": 12, "P2": 6}


def test_the_summary_counts_what_a_plan_sees(site):
    site.withdraw(slides="a.tif")
    (site.folder / "b.tif").unlink()
    site.scan()
    summary = site_cohort.summary(site.store, PLAN, KEY)
    assert summary.slides == {SlideStatus.REFUSED: 1, SlideStatus.MISSING: 1, SlideStatus.USABLE: 1}
    assert summary.reasons == {ErrorCode.SLIDE_WITHDRAWN: 1, ErrorCode.SLIDE_MISSING: 1}
    assert (summary.patients, summary.tiles) == (1, 6)
