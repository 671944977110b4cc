"""The names a withdrawal is kept under."""

from hypothesis import given
from hypothesis import strategies as st

from pathfed_client.cohort.cohort import Pseudonym
from pathfed_client.cohort.patient_list import pseudonym
from pathfed_client.cohort.withdrawal import NO_CONTENTS, Withdrawn, WithdrawnKind, is_withdrawn, of_slide
from pathfed_common import digest

KEY = bytes(range(32))
CONTENTS = digest.of_bytes(b"a")


def slide(withdrawn, *, patient="1" * 32, path="a.svs", contents=CONTENTS, key=KEY) -> bool:
    return is_withdrawn(frozenset(withdrawn), key, patient=Pseudonym(patient) if patient else None, path=path, fingerprint=contents)


def test_a_slide_is_known_again_by_path_and_by_contents_and_by_nothing_else():
    names = of_slide(KEY, "a.svs", CONTENTS)
    assert {one.kind for one in names} == {WithdrawnKind.PATH, WithdrawnKind.CONTENTS}
    assert slide(names)
    assert slide(names, path="moved.svs")
    assert slide(names, contents=digest.of_bytes(b"rescanned"))
    assert slide(names, contents=None)
    assert not slide(names, path="b.svs", contents=digest.of_bytes(b"b"))
    assert not slide(names, key=bytes(32))


def test_a_patient_is_known_again_by_the_pseudonym():
    names = {Withdrawn(WithdrawnKind.PATIENT, pseudonym(KEY, "P1"))}
    assert slide(names, patient=pseudonym(KEY, " p1 "))
    assert not slide(names, patient=pseudonym(KEY, "P2"))
    assert not slide(names, patient=None)


def test_a_kind_is_never_taken_for_another():
    name = "1" * 32
    assert slide({Withdrawn(WithdrawnKind.PATIENT, name)}, patient=name)
    assert not slide({Withdrawn(WithdrawnKind.PATH, name), Withdrawn(WithdrawnKind.CONTENTS, name)}, patient=name)


def test_a_slide_that_could_not_be_reached_takes_no_other_such_slide_with_it():
    names = of_slide(KEY, "a.svs", NO_CONTENTS)
    assert {one.kind for one in names} == {WithdrawnKind.PATH}
    assert not slide(names, path="b.svs", contents=NO_CONTENTS)


def test_nothing_is_withdrawn_where_nothing_was():
    assert not slide(())


@given(st.text(), st.text())
def test_names_tell_nothing_and_differ_where_paths_do(left, right):
    one, other = of_slide(KEY, left, None), of_slide(KEY, right, None)
    assert (one == other) == (left == right)
    assert all(len(name.name) == 32 and int(name.name, 16) >= 0 for name in one)
