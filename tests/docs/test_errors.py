import pytest

from pathfed_common.error_catalog import CATALOG
from pathfed_common.errors import ErrorCode, PathfedError


def test_every_code_has_an_entry_and_a_page(root):
    assert set(CATALOG) == set(ErrorCode)
    assert {page.stem for page in (root / "docs" / "errors").glob("PF*.md")} == {code.value for code in ErrorCode}


@pytest.mark.parametrize("code", list(ErrorCode), ids=lambda code: code.value)
def test_entry_says_what_it_means_and_what_to_do(code):
    entry = CATALOG[code]
    assert 10 <= len(entry.title) <= 60
    assert not entry.title.endswith(".")
    assert code.value not in entry.title
    assert len(entry.meaning) > 40
    assert len(entry.remedy) > 20
    assert entry.meaning.endswith(".")
    assert entry.remedy.endswith(".")


def test_no_two_codes_share_a_title():
    titles = [entry.title for entry in CATALOG.values()]
    assert len(set(titles)) == len(titles)


def test_every_family_has_an_exit_status_of_its_own_and_a_title(generate):
    families = PathfedError.__subclasses__()
    assert len({family.exit_status for family in families}) == len(families)
    assert {family.family for family in families} == set(generate.FAMILY_TITLES)
    assert {code.value[:3] for code in ErrorCode} == {family.family for family in families}
